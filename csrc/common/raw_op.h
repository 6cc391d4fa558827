// What is registered with PyTorch's dispatcher for an op.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>

#include "common/tensor.h"

namespace oner_fast {

// Whether autograd would need the derivative of what is computed from `x`. Asked only where gradients are recorded.
bool needs_gradient(const Tensor& x);
inline bool needs_gradient(const OptionalTensor& x) { return x.has_value() && needs_gradient(*x); }
template <typename Other>
bool needs_gradient(const Other&) {
  return false;
}

// A type as schemas write it.
template <typename Type>
struct SchemaType;
template <>
struct SchemaType<Tensor> {
  static std::string name() { return "Tensor"; }
};
template <>
struct SchemaType<OptionalTensor> {
  static std::string name() { return "Tensor?"; }
};
template <>
struct SchemaType<int64_t> {
  static std::string name() { return "int"; }
};
template <>
struct SchemaType<bool> {
  static std::string name() { return "bool"; }
};
template <>
struct SchemaType<double> {
  static std::string name() { return "float"; }
};
template <>
struct SchemaType<ScalarType> {
  static std::string name() { return "ScalarType"; }
};
template <>
struct SchemaType<IntList> {
  static std::string name() { return "int[]"; }
};
template <>
struct SchemaType<std::string> {
  static std::string name() { return "str"; }
};
template <typename... Types>
struct SchemaType<std::tuple<Types...>> {
  static std::string name() {
    std::string all;
    ((all += (all.empty() ? "" : ",") + SchemaType<Types>::name()), ...);
    return all;
  }
};

// What this library registers: "name(Tensor,int)->Tensor" and a newline for each raw op. The stable ABI hands over
// arguments without their types, so Python compares these with its own schemas before it calls any.
std::string& signatures();

// The name of an op, as an argument of a template.
template <size_t size>
struct Name {
  char text[size];
  constexpr Name(const char (&from)[size]) { std::copy_n(from, size, text); }  // NOLINT: implicit, like a literal
};

// Gradients belong to the public functions in oner_fast.ops; a raw op refuses to lose one. Only its first
// `differentiable` arguments can ask for one.
template <Name name, auto function, size_t differentiable = std::numeric_limits<size_t>::max()>
struct RawOp;

template <Name name, typename Result, typename... Arguments, Result (*function)(Arguments...), size_t differentiable>
struct RawOp<name, function, differentiable> {
  static void sign() {
    signatures() += std::string(name.text) + "(" + SchemaType<std::tuple<std::decay_t<Arguments>...>>::name() + ")->" +
                    SchemaType<Result>::name() + "\n";
  }
  static Result call(Arguments... arguments) {
    size_t place = 0;
    if (aoti_torch_grad_mode_is_enabled() && ((place++ < differentiable && needs_gradient(arguments)) || ...))
      fail<std::runtime_error>("the derivative of torch.ops.oner_fast.", name.text,
                               " is not implemented; call the function of oner_fast.ops, or the op under no_grad()");
    return function(arguments...);
  }
};

}  // namespace oner_fast

#define ONER_FAST_IMPL(library, name, function, ...)                      \
  ::oner_fast::RawOp<name, &function __VA_OPT__(, ) __VA_ARGS__>::sign(); \
  library.impl(name, TORCH_BOX((&::oner_fast::RawOp<name, &function __VA_OPT__(, ) __VA_ARGS__>::call)))
