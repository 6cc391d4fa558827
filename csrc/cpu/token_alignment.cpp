// token_alignment: minus the mean cosine of student and teacher rows. Bound by memory: each pass reads both rows once.
#include "cpu/isa/token_alignment.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/kept.h"
#include "common/norm.h"
#include "common/numbers.h"
#include "common/ops.h"
#include "common/parallel.h"
#include "cpu/kinds.h"
#include "cpu/large_pages.h"
#include "cpu/output.h"

namespace oner_fast {
namespace {

constexpr const char* kOp = "token_alignment";
constexpr double kLeast = 1e-30;          // a smaller factor, times the gradient of the loss, may underflow float32
constexpr int64_t kGrainBytes = 1 << 16;  // less than this is not worth another thread

// Row i of the student and the teacher row it is aligned with.
class Pairs {
 public:
  Pairs(const Tensor& student, const Tensor& teacher, const OptionalTensor& kept)
      : student_("student", student), teacher_("teacher", teacher) {
    student_kind = kind_of(kOp, "student", type_of(student));
    teacher_kind = kind_of(kOp, "teacher", type_of(teacher));
    samples_ = student.size(0), per_sample_ = student.size(1), width = student.size(2);
    const int64_t cells = teacher.size(1);
    CHECK_VALUE(teacher.size(0) == samples_ && teacher.size(2) == width && (kept.has_value() || cells == per_sample_),
                kOp, ": student has shape ", student.sizes(), ", which teacher ", teacher.sizes(), " does not fit");
    if (kept.has_value()) {
      kept_.emplace(kOp, *kept, std::nullopt, samples_, cells);
      CHECK_VALUE(kept->size(1) == per_sample_, kOp, ": kept must have shape ", student.sizes().slice(0, 2), ", got ",
                  kept->sizes());
    }
    rows = samples_ * per_sample_;
    grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, width * item_size(student)));
  }

  const char* student(int64_t row) const { return student_.row(row / per_sample_, row % per_sample_); }
  const char* teacher(int64_t row) const {
    return teacher_.row(row / per_sample_, kept_.has_value() ? (*kept_)[row] : row % per_sample_);
  }

  Kind student_kind, teacher_kind;
  int64_t rows, width, grain;

 private:
  // The rows of a tensor, and the tensor itself, which keeps a dense copy alive.
  struct Side {
    Side(const char* name, const Tensor& x) : holder(dense_rows(name, x)) {
      const int64_t size = item_size(holder);
      data = static_cast<const char*>(holder.const_data_ptr());
      sample_bytes = holder.stride(0) * size, row_bytes = holder.stride(1) * size;
    }
    const char* row(int64_t sample, int64_t row) const { return data + sample * sample_bytes + row * row_bytes; }

    Tensor holder;
    const char* data;
    int64_t sample_bytes, row_bytes;

   private:
    static Tensor dense_rows(const char* name, const Tensor& x) {
      CHECK_VALUE(x.dim() == 3, kOp, ": ", name, " must have 3 dimensions, got ", x.sizes());
      return x.stride(2) == 1 ? x : dense(x);
    }
  };

  Side student_, teacher_;
  std::optional<Kept> kept_;
  int64_t samples_, per_sample_;
};

// The cosine of a pair of rows, and the factors of both rows in its gradient:
// d cos / d s = t / (|s| |t|) - s cos / |s|^2, all 0 where either row counts as zeros, NaN where squares overflow.
struct Pair {
  double cosine, to_student, to_teacher;

  explicit Pair(const double (&sum)[3]) {
    const double by_student = 1 / divisor_of(std::sqrt(sum[0]));
    to_teacher = by_student / divisor_of(std::sqrt(sum[1]));
    cosine = sum[2] * to_teacher;
    to_student = -cosine * by_student * by_student;
  }
};

}  // namespace

// The second result holds, row by row, the factors of a Pair.
std::tuple<Tensor, Tensor> token_alignment(const Tensor& student, const Tensor& teacher, const OptionalTensor& kept) {
  const Pairs pairs(student, teacher, kept);
  CHECK_VALUE(pairs.rows > 0 && pairs.width > 0, kOp, ": student must hold at least one token, got shape ",
              student.sizes());
  const ScalarType wide = statistics_type(type_of(student));
  const Tensor factors = empty({pairs.rows, 2}, wide, student), loss = empty({}, wide, student);
  std::vector<double> cosines(static_cast<size_t>(pairs.rows));
  const bool is_double = pairs.student_kind == kF64;
  void* saved = factors.mutable_data_ptr();
  const TokenAlignmentKernels& kernels = token_alignment_kernels();
  const auto sums = kernels.sums[pairs.student_kind][pairs.teacher_kind];
  parallel_for(0, pairs.rows, pairs.grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t next = std::min(i + 1, last - 1);
      double sum[3];
      sums(sum, pairs.student(i), pairs.teacher(i), pairs.width, pairs.student(next), pairs.teacher(next));
      // The lanes of a float32 sum are added in float64, where they overflow later.
      for (double& x : sum)
        if (!is_double && x > std::numeric_limits<float>::max()) x = std::numeric_limits<double>::infinity();
      const Pair pair(sum);
      cosines[static_cast<size_t>(i)] = pair.cosine;
      if (is_double) {
        static_cast<double*>(saved)[2 * i] = pair.to_student;
        static_cast<double*>(saved)[2 * i + 1] = pair.to_teacher;
      } else {
        static_cast<float*>(saved)[2 * i] = static_cast<float>(pair.to_student);
        static_cast<float*>(saved)[2 * i + 1] = static_cast<float>(pair.to_teacher);
      }
    }
  });
  double total = 0;  // in the order of the rows: the same for any number of threads
  for (const double cosine : cosines) total += cosine;
  fill(loss, -total / static_cast<double>(pairs.rows));
  return {loss, factors};
}

Tensor token_alignment_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                const OptionalTensor& kept, const Tensor& factors) {
  const Pairs pairs(student, teacher, kept);
  const ScalarType wide = statistics_type(type_of(student));
  const double to_loss = number_in(kOp, "the gradient", grad);
  const bool fits = factors.dim() == 2 && factors.size(0) == pairs.rows && factors.size(1) == 2;
  CHECK_VALUE(fits && type_of(factors) == wide && factors.is_contiguous(), kOp, ": factors must be (", pairs.rows,
              ", 2) of ", wide, ", got ", factors.sizes(), " of ", type_of(factors));
  const Tensor out = with_large_pages(empty(student.sizes(), type_of(student), student));
  if (out.numel() == 0) return out;
  const double scale = -to_loss / static_cast<double>(pairs.rows);
  const bool is_double = pairs.student_kind == kF64;
  const void* saved = factors.const_data_ptr();
  const auto factor = [&](int64_t i) {
    return is_double ? static_cast<const double*>(saved)[i] : static_cast<double>(static_cast<const float*>(saved)[i]);
  };
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t bytes = pairs.width * item_size(out);
  const TokenAlignmentKernels& kernels = token_alignment_kernels();
  const auto combine = kernels.combine[pairs.student_kind][pairs.teacher_kind];
  const auto wide_sums = kernels.wide_sums[pairs.student_kind][pairs.teacher_kind];
  const auto wide_combine = kernels.wide_combine[pairs.student_kind][pairs.teacher_kind];
  const Output output(pairs.rows * bytes);
  parallel_for(0, pairs.rows, pairs.grain, [&](int64_t first, int64_t last) {
    // In reverse, since the rows that forward read last may still be in the cache.
    for (int64_t i = last - 1; i >= first; --i) {
      const int64_t next = std::max(i - 1, first);
      const char *student_row = pairs.student(i), *teacher_row = pairs.teacher(i);
      const double to_student = factor(2 * i), to_teacher = factor(2 * i + 1);
      if (is_double || !(std::abs(to_student) < kLeast || to_teacher < kLeast)) {
        combine(to + i * bytes, student_row, teacher_row, pairs.width, scale * to_student, scale * to_teacher,
                pairs.student(next), pairs.teacher(next), output.streamed());
      } else {  // underflow in float32, or 0 as for orthogonal rows and rows of zeros: computed again
        double sum[3];
        wide_sums(sum, student_row, teacher_row, pairs.width, student_row, teacher_row);
        const Pair pair(sum);
        wide_combine(to + i * bytes, student_row, teacher_row, pairs.width, scale * pair.to_student,
                     scale * pair.to_teacher, pairs.student(next), pairs.teacher(next), output.streamed());
      }
    }
    output.finish();
  });
  return out;
}

}  // namespace oner_fast
