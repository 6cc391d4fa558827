#include <tuple>

#include "cuda/bindings/arguments.h"
#include "cuda/bindings/ops.h"

namespace oner_fast::cuda {
namespace {

constexpr const char* kOp = "token_alignment";

Tensor three_dimensions(const Tensor& x) {
  CHECK_VALUE(x.dim() == 3, kOp, ": student and teacher must have 3 dimensions, got shape ", x.sizes());
  return with_dense_rows(x);
}

// The call that both directions share, with the tensors it points to.
struct Rows {
  Tensor student, teacher;
  OptionalTensor kept;
  TokenAlignment call{};

  Rows(const Tensor& student_in, const Tensor& teacher_in, const OptionalTensor& kept_in)
      : student(three_dimensions(student_in)), teacher(three_dimensions(teacher_in)) {
    const int64_t samples = student.size(0), per_sample = student.size(1), width = student.size(2),
                  cells = teacher.size(1);
    CHECK_VALUE(teacher.size(0) == samples && teacher.size(2) == width && (kept_in.has_value() || cells == per_sample),
                kOp, ": student has shape ", student.sizes(), ", which teacher ", teacher.sizes(), " does not fit");
    if (kept_in.has_value()) {
      CHECK_TYPE(kept_in->scalar_type() == kLong, kOp, ": kept must be int64, got ", kept_in->scalar_type());
      CHECK_VALUE(kept_in->dim() == 2 && kept_in->size(0) == samples && kept_in->size(1) == per_sample, kOp,
                  ": kept must have shape ", student.sizes().slice(0, 2), ", got ", kept_in->sizes());
      kept = dense(*kept_in);
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
    CHECK_TYPE(call.student_number != kU8 && call.teacher_number != kU8, kOp, ": student and teacher must be floating");
  }
  int64_t rows() const { return call.samples * call.per_sample; }
  ScalarType wide() const { return statistics_type(student.scalar_type()); }
};

}  // namespace

std::tuple<Tensor, Tensor> token_alignment(const Tensor& student, const Tensor& teacher, const OptionalTensor& kept) {
  same_device(kOp, student, {teacher, kept});
  const Launch launch(student);
  Rows pairs(student, teacher, kept);
  CHECK_VALUE(pairs.rows() > 0 && pairs.call.width > 0, kOp, ": student must hold at least one token, got shape ",
              student.sizes());
  const Tensor loss = empty({}, pairs.wide(), student), factors = empty({pairs.rows(), 2}, pairs.wide(), student),
               partials = empty({oner_fast_token_alignment_partials(pairs.rows())}, kDouble, student);
  pairs.call.loss = result(loss);
  pairs.call.factors = result(factors);
  pairs.call.partials = static_cast<double*>(result(partials));
  STD_CUDA_CHECK(oner_fast_token_alignment(&pairs.call, launch.stream()));
  return {loss, factors};
}

Tensor token_alignment_backward(const Tensor& grad_in, const Tensor& student, const Tensor& teacher,
                                const OptionalTensor& kept, const Tensor& factors) {
  same_device(kOp, student, {grad_in, teacher, kept, factors});
  const Launch launch(student);
  Rows pairs(student, teacher, kept);
  CHECK_VALUE(grad_in.numel() == 1, kOp, ": the gradient must hold one number, got shape ", grad_in.sizes());
  const bool fits = factors.dim() == 2 && factors.size(0) == pairs.rows() && factors.size(1) == 2;
  CHECK_VALUE(fits && factors.scalar_type() == pairs.wide() && factors.is_contiguous(), kOp, ": factors must be (",
              pairs.rows(), ", 2) of ", pairs.wide(), ", got ", factors.sizes(), " of ", factors.scalar_type());
  const Tensor grad = dense(of_type(grad_in, pairs.wide()));
  const Tensor out = empty(student.sizes(), student.scalar_type(), student);
  pairs.call.grad = data(grad);
  pairs.call.factors = const_cast<void*>(data(factors));
  pairs.call.to_student = result(out);
  STD_CUDA_CHECK(oner_fast_token_alignment_backward(&pairs.call, launch.stream()));
  return out;
}

}  // namespace oner_fast::cuda
