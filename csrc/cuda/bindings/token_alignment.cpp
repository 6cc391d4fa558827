#include <ATen/ops/empty.h>

#include <tuple>

#include "cuda/bindings/arguments.h"
#include "cuda/bindings/ops.h"

namespace oner_fast::cuda {
namespace {

constexpr const char* kOp = "token_alignment";

// The call that both directions share, with the tensors it points to.
struct Rows {
  at::Tensor student, teacher, kept;
  TokenAlignment call{};

  Rows(const at::Tensor& student_in, const at::Tensor& teacher_in, const OptionalTensor& kept_in) {
    TORCH_CHECK_VALUE(student_in.dim() == 3 && teacher_in.dim() == 3, kOp,
                      ": student and teacher must have 3 dimensions, got ", student_in.sizes(), " and ",
                      teacher_in.sizes());
    student = with_dense_rows(student_in);
    teacher = with_dense_rows(teacher_in);
    const int64_t samples = student.size(0), per_sample = student.size(1), width = student.size(2),
                  cells = teacher.size(1);
    TORCH_CHECK_VALUE(
        teacher.size(0) == samples && teacher.size(2) == width && (kept_in.has_value() || cells == per_sample), kOp,
        ": student has shape ", student.sizes(), ", which teacher ", teacher.sizes(), " does not fit");
    if (kept_in.has_value()) {
      TORCH_CHECK_TYPE(kept_in->scalar_type() == at::kLong, kOp, ": kept must be int64, got ", kept_in->scalar_type());
      TORCH_CHECK_VALUE(kept_in->dim() == 2 && kept_in->size(0) == samples && kept_in->size(1) == per_sample, kOp,
                        ": kept must have shape ", student.sizes().slice(0, 2), ", got ", kept_in->sizes());
      kept = kept_in->contiguous();
    }
    call.student = data(student);
    call.teacher = data(teacher);
    call.kept = static_cast<const int64_t*>(data(kept));
    call.samples = samples;
    call.per_sample = per_sample;
    call.cells = cells;
    call.student_sample_stride = student.stride(0);
    call.student_token_stride = student.stride(1);
    call.teacher_sample_stride = teacher.stride(0);
    call.teacher_token_stride = teacher.stride(1);
    call.width = narrow_size(kOp, "the width of student", width);
    call.student_number = number_of(kOp, "student", student.scalar_type());
    call.teacher_number = number_of(kOp, "teacher", teacher.scalar_type());
    TORCH_CHECK_TYPE(call.student_number != kU8 && call.teacher_number != kU8, kOp,
                     ": student and teacher must be floating");
  }
  int64_t rows() const { return call.samples * call.per_sample; }
  at::TensorOptions wide() const { return student.options().dtype(statistics_type(student.scalar_type())); }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> token_alignment(const at::Tensor& student, const at::Tensor& teacher,
                                                   const OptionalTensor& kept) {
  same_device(kOp, student, {teacher, kept});
  const c10::cuda::CUDAGuard guard(student.device());
  Rows pairs(student, teacher, kept);
  TORCH_CHECK_VALUE(pairs.rows() > 0 && pairs.call.width > 0, kOp, ": student must hold at least one token, got shape ",
                    student.sizes());
  const at::Tensor loss = at::empty({}, pairs.wide()), factors = at::empty({pairs.rows(), 2}, pairs.wide());
  const at::Tensor partials =
      at::empty({oner_fast_token_alignment_partials(pairs.rows())}, student.options().dtype(at::kDouble));
  pairs.call.loss = result(loss);
  pairs.call.factors = result(factors);
  pairs.call.partials = static_cast<double*>(result(partials));
  C10_CUDA_CHECK(oner_fast_token_alignment(&pairs.call, c10::cuda::getCurrentCUDAStream()));
  return {loss, factors};
}

at::Tensor token_alignment_backward(const at::Tensor& grad_in, const at::Tensor& student, const at::Tensor& teacher,
                                    const OptionalTensor& kept, const at::Tensor& factors) {
  same_device(kOp, student, {grad_in, teacher, kept, factors});
  const c10::cuda::CUDAGuard guard(student.device());
  Rows pairs(student, teacher, kept);
  TORCH_CHECK_VALUE(grad_in.numel() == 1, kOp, ": the gradient must hold one number, got shape ", grad_in.sizes());
  const at::ScalarType wide = statistics_type(student.scalar_type());
  const bool fits = factors.dim() == 2 && factors.size(0) == pairs.rows() && factors.size(1) == 2;
  TORCH_CHECK_VALUE(fits && factors.scalar_type() == wide && factors.is_contiguous(), kOp, ": factors must be (",
                    pairs.rows(), ", 2) of ", wide, ", got ", factors.sizes(), " of ", factors.scalar_type());
  const at::Tensor grad = grad_in.to(wide).contiguous();
  const at::Tensor out = at::empty(student.sizes(), student.options().memory_format(at::MemoryFormat::Contiguous));
  pairs.call.grad = data(grad);
  pairs.call.factors = const_cast<void*>(data(factors));
  pairs.call.to_student = result(out);
  C10_CUDA_CHECK(oner_fast_token_alignment_backward(&pairs.call, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace oner_fast::cuda
