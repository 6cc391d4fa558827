// token_alignment: minus the mean cosine of student and teacher rows. A warp takes a pair of rows: three sums in one
// pass, and in backward a weighted sum of both rows. Bound by memory.
//
// For R pairs of rows of `w` bytes, forward reads 2 R w bytes and writes 8 R, and one double of the mean's scratch for
// each block of 8 rows. Backward reads 2 R w and writes R w. This is the ideal: rows are read once in each direction.
#include <cfloat>

#include "cuda/kept.cuh"
#include "cuda/numbers.cuh"

namespace oner_fast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kTogether = 4;
constexpr double kLeast = 1e-30;  // a smaller factor, times the gradient of the loss, may underflow float

struct Pair {
  int64_t student, teacher;  // offsets of the first numbers; teacher is -1 where its index is wrong
  __device__ __forceinline__ Pair(const TokenAlignment& a, int64_t row) {
    const int64_t sample = divided(row, a.per_sample), token = row - sample * a.per_sample;
    const int64_t other = a.kept == nullptr ? token : __ldg(a.kept + row);
    student = sample * a.student_sample_stride + token * a.student_token_stride;
    teacher = other >= 0 && other < a.cells ? sample * a.teacher_sample_stride + other * a.teacher_token_stride : -1;
  }
};

template <typename Wide>
__device__ __forceinline__ Wide sum_of_warp(Wide x) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) x += __shfl_xor_sync(~0u, x, half);
  return x;
}

// |s|^2, |t|^2 and <s, t>, in every lane.
template <typename Wide>
struct Sums {
  Wide student = 0, teacher = 0, both = 0;
  __device__ __forceinline__ void add(Wide s, Wide t) {
    student += s * s;
    teacher += t * t;
    both += s * t;
  }
  __device__ __forceinline__ void over_warp() {
    student = sum_of_warp(student);
    teacher = sum_of_warp(teacher);
    both = sum_of_warp(both);
  }
};

// d cos / d s = t / (|s| |t|) - s cos / |s|^2, all 0 where either row counts as zeros, NaN where squares overflow.
template <typename Wide>
struct Factors {
  Wide cosine, to_student, to_teacher;
  __device__ __forceinline__ explicit Factors(const Sums<Wide>& sums) {
    const Wide by_student = Wide(1) / divisor_of(sqrt(sums.student));
    to_teacher = by_student / divisor_of(sqrt(sums.teacher));
    cosine = sums.both * to_teacher;
    to_student = -cosine * by_student * by_student;
  }
};

// The sums for any two types and any alignment, in double.
__device__ __forceinline__ Sums<double> sums_of_any(const TokenAlignment& a, const Pair& pair) {
  Sums<double> sums;
  for (int i = threadIdx.x % 32; i < a.width; i += 32)
    sums.add(read_any<double>(a.student, a.student_number, pair.student + i),
             pair.teacher < 0 ? 0.0 : read_any<double>(a.teacher, a.teacher_number, pair.teacher + i));
  sums.over_warp();
  return sums;
}

// N numbers of both rows at a time; N = 0 means one number of any type, in double.
template <typename Wide, typename S, typename T, int N>
__device__ __forceinline__ Sums<Wide> sums_of(const TokenAlignment& a, const Pair& pair) {
  if constexpr (N == 0) {
    return sums_of_any(a, pair);
  } else {
    const S* student = static_cast<const S*>(a.student) + pair.student;
    const T* teacher = static_cast<const T*>(a.teacher) + pair.teacher;
    Sums<Wide> sums;
    for (int first = threadIdx.x % 32 * N; first < a.width; first += 32 * N * kTogether) {
      Bits<S, N> s[kTogether];
      Bits<T, N> t[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int column = first + i * 32 * N;
        s[i] = column < a.width ? read<S, N>(student + column) : zeros<S, N>();
        t[i] = column < a.width && pair.teacher >= 0 ? read<T, N>(teacher + column) : zeros<T, N>();
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        Wide x[N], y[N];
        widen(s[i], x);
        widen(t[i], y);
#pragma unroll
        for (int j = 0; j < N; ++j) sums.add(x[j], y[j]);
      }
    }
    sums.over_warp();
    return sums;
  }
}

// A sum of squares, infinite where float would be.
template <typename Wide>
__device__ __forceinline__ Wide overflowing(Wide squares) {
  return squares > Wide(FLT_MAX) ? Wide(INFINITY) : squares;
}

template <typename Wide>
__device__ __forceinline__ void save_factors(const TokenAlignment& a, int64_t row, const Factors<Wide>& factors) {
  if (threadIdx.x % 32 != 0) return;
  write_any(a.factors, a.student_number == kF64 ? kF64 : kF32, 2 * row, factors.to_student);
  write_any(a.factors, a.student_number == kF64 ? kF64 : kF32, 2 * row + 1, factors.to_teacher);
}

template <typename Wide, typename S, typename T, int N>
__global__ void __launch_bounds__(kThreads) token_alignment_forward(const TokenAlignment a, int64_t rows) {
  __shared__ double cosines[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x * int64_t{kWarps} + warp;
  double cosine = 0;
  if (row < rows) {
    const Pair pair(a, row);
    Sums<Wide> sums = sums_of<Wide, S, T, N>(a, pair);
    if (std::is_same_v<Wide, double> && a.student_number != kF64) {  // squares overflow as they do in float
      sums.student = overflowing(sums.student);
      sums.teacher = overflowing(sums.teacher);
    }
    const Factors<Wide> factors(sums);
    cosine = factors.cosine;
    save_factors(a, row, factors);
  }
  if (lane == 0) cosines[warp] = cosine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += cosines[i];
  a.partials[blockIdx.x] = total;
}

// Adds the partial sums in one block, in an order that depends on their number alone.
__global__ void __launch_bounds__(kThreads)
    token_alignment_mean(const TokenAlignment a, int64_t rows, int64_t partials) {
  __shared__ double sums[kWarps];
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < partials; i += kThreads) sum += a.partials[i];
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += sums[i];
  write_any(a.loss, a.student_number == kF64 ? kF64 : kF32, 0, -total / static_cast<double>(rows));
}

__device__ __forceinline__ void combine_any(const TokenAlignment& a, const Pair& pair, int64_t row, double by_student,
                                            double by_teacher) {
  for (int i = threadIdx.x % 32; i < a.width; i += 32) {
    const double t = pair.teacher < 0 ? 0.0 : read_any<double>(a.teacher, a.teacher_number, pair.teacher + i);
    write_any(a.to_student, a.student_number, row * a.width + i,
              by_teacher * t + by_student * read_any<double>(a.student, a.student_number, pair.student + i));
  }
}

template <typename Wide, typename S, typename T, int N>
__global__ void __launch_bounds__(kThreads) token_alignment_backward(const TokenAlignment a, int64_t rows) {
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (row >= rows) return;
  const Pair pair(a, row);
  const int32_t saved = a.student_number == kF64 ? kF64 : kF32;
  const double scale = -read_any<double>(a.grad, saved, 0) / static_cast<double>(rows);
  const double to_student = read_any<double>(a.factors, saved, 2 * row);
  const double to_teacher = read_any<double>(a.factors, saved, 2 * row + 1);
  // Factors that underflow float, or are 0 as for orthogonal rows and rows of zeros, are computed again in double.
  if (saved == kF32 && (fabs(to_student) < kLeast || to_teacher < kLeast)) {
    const Factors<double> exact(sums_of_any(a, pair));
    combine_any(a, pair, row, scale * exact.to_student, scale * exact.to_teacher);
    return;
  }
  const Wide by_student = static_cast<Wide>(scale * to_student), by_teacher = static_cast<Wide>(scale * to_teacher);
  if constexpr (N == 0) {
    combine_any(a, pair, row, by_student, by_teacher);
  } else {
    const S* student = static_cast<const S*>(a.student) + pair.student;
    const T* teacher = static_cast<const T*>(a.teacher) + pair.teacher;
    S* to = static_cast<S*>(a.to_student) + row * a.width;
    for (int first = threadIdx.x % 32 * N; first < a.width; first += 32 * N * kTogether) {
      Bits<S, N> s[kTogether];
      Bits<T, N> t[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int column = first + i * 32 * N;
        s[i] = column < a.width ? read<S, N>(student + column) : zeros<S, N>();
        t[i] = column < a.width && pair.teacher >= 0 ? read<T, N>(teacher + column) : zeros<T, N>();
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int column = first + i * 32 * N;
        if (column >= a.width) break;
        Wide x[N], y[N];
        widen(s[i], x);
        widen(t[i], y);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = by_teacher * y[j] + by_student * x[j];
        write(to + column, narrow<S>(x));
      }
    }
  }
}

// Whether N numbers of either row are whole words for every row.
template <typename S, typename T, int N>
bool fits(const TokenAlignment& a) {
  const int64_t student = a.student_sample_stride | a.student_token_stride | a.width;
  const int64_t teacher = a.teacher_sample_stride | a.teacher_token_stride | a.width;
  constexpr int64_t kS = N * sizeof(S), kT = N * sizeof(T);
  return student * static_cast<int64_t>(sizeof(S)) % kS == 0 && teacher * static_cast<int64_t>(sizeof(T)) % kT == 0 &&
         aligned(a.student, kS) && aligned(a.teacher, kT) && aligned(a.to_student, kS);
}

// Calls run<Wide, S, T, N>() for the types of the call.
template <typename Run>
cudaError_t with_types(const TokenAlignment& a, const Run& run) {
  const auto pair = [&](auto student, auto teacher) {
    using S = decltype(student);
    using T = decltype(teacher);
    constexpr int kNumbers = 16 / (sizeof(S) > sizeof(T) ? sizeof(S) : sizeof(T));
    if (fits<S, T, kNumbers>(a))
      run.template operator()<WideOf<S>, S, T, kNumbers>();
    else
      run.template operator()<double, void, void, 0>();
  };
  const auto second = [&](auto student) {
    if (a.teacher_number == kF32)
      pair(student, float());
    else if (a.teacher_number == kF16)
      pair(student, __half());
    else
      pair(student, __nv_bfloat16());
  };
  if (a.student_number == kF64 && a.teacher_number == kF64)
    pair(double(), double());
  else if (a.student_number == kF64 || a.teacher_number == kF64)
    run.template operator()<double, void, void, 0>();
  else if (a.student_number == kF32)
    second(float());
  else if (a.student_number == kF16)
    second(__half());
  else
    second(__nv_bfloat16());
  return cudaGetLastError();
}

struct Forward {
  const TokenAlignment& a;
  int64_t rows;
  cudaStream_t stream;
  template <typename Wide, typename S, typename T, int N>
  void operator()() const {
    const int64_t blocks = blocks_for(rows, kWarps);
    token_alignment_forward<Wide, S, T, N><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a, rows);
    token_alignment_mean<<<1, kThreads, 0, stream>>>(a, rows, blocks);
  }
};

struct Backward {
  const TokenAlignment& a;
  int64_t rows;
  cudaStream_t stream;
  template <typename Wide, typename S, typename T, int N>
  void operator()() const {
    const dim3 grid(static_cast<unsigned>(blocks_for(rows, kWarps)));
    token_alignment_backward<Wide, S, T, N><<<grid, kThreads, 0, stream>>>(a, rows);
  }
};

}  // namespace

extern "C" int64_t oner_fast_token_alignment_partials(int64_t rows) { return blocks_for(rows, kWarps); }

extern "C" cudaError_t oner_fast_token_alignment(const TokenAlignment* call, cudaStream_t stream) {
  const int64_t rows = call->samples * call->per_sample;
  return rows == 0 ? cudaSuccess : with_types(*call, Forward{*call, rows, stream});
}

extern "C" cudaError_t oner_fast_token_alignment_backward(const TokenAlignment* call, cudaStream_t stream) {
  const int64_t rows = call->samples * call->per_sample;
  return rows == 0 || call->width == 0 ? cudaSuccess : with_types(*call, Backward{*call, rows, stream});
}

}  // namespace oner_fast::cuda
