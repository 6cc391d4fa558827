// oner_fast._native: functions on Python lists, which a torch op cannot take efficiently.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

py::bytearray room_for(size_t bytes) {
  PyObject* made = PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bytes));
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::bytearray>(made);
}

// Ragged lists of integers as one flat int64 buffer and the int32 boundaries (len + 1) of the lists in it.
py::tuple pack(const py::list& lists) {
  const Py_ssize_t count = PyList_GET_SIZE(lists.ptr());
  py::bytearray boundaries = room_for(static_cast<size_t>(count + 1) * sizeof(int32_t));
  int32_t* cu_seqlens = reinterpret_cast<int32_t*>(PyByteArray_AS_STRING(boundaries.ptr()));
  int64_t total = 0;
  cu_seqlens[0] = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* row = PyList_GET_ITEM(lists.ptr(), i);
    if (!PyList_Check(row))
      throw py::type_error("pack: lists[" + std::to_string(i) + "] must be a list of int, got " +
                           Py_TYPE(row)->tp_name);
    total += PyList_GET_SIZE(row);
    if (total > std::numeric_limits<int32_t>::max())
      throw py::value_error("pack: more than 2^31 - 1 values in all, which cu_seqlens in int32 cannot count");
    cu_seqlens[i + 1] = static_cast<int32_t>(total);
  }
  py::bytearray values = room_for(static_cast<size_t>(total) * sizeof(int64_t));
  int64_t* flat = reinterpret_cast<int64_t*>(PyByteArray_AS_STRING(values.ptr()));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* row = PyList_GET_ITEM(lists.ptr(), i);
    // Converting a value may run Python code, which could shorten the list, so the length is read each time.
    for (Py_ssize_t j = 0; j < cu_seqlens[i + 1] - cu_seqlens[i]; ++j) {
      if (j >= PyList_GET_SIZE(row)) throw py::value_error("pack: a list changed while it was packed");
      PyObject* value = PyList_GET_ITEM(row, j);
      if (!PyLong_Check(value))
        throw py::type_error("pack: lists[" + std::to_string(i) + "][" + std::to_string(j) + "] must be an int, got " +
                             Py_TYPE(value)->tp_name);
      int overflow = 0;
      const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
      if (overflow != 0)
        throw py::value_error("pack: lists[" + std::to_string(i) + "][" + std::to_string(j) + "] does not fit int64");
      flat[cu_seqlens[i] + j] = number;
    }
  }
  return py::make_tuple(values, boundaries);
}

py::list cpu_features() {
  py::list found;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#define ONER_FAST_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.append(name)
  ONER_FAST_FEATURE("sse4.2");
  ONER_FAST_FEATURE("avx");
  ONER_FAST_FEATURE("f16c");
  ONER_FAST_FEATURE("fma");
  ONER_FAST_FEATURE("avx2");
  ONER_FAST_FEATURE("avx512f");
  ONER_FAST_FEATURE("avx512bw");
  ONER_FAST_FEATURE("avx512dq");
  ONER_FAST_FEATURE("avx512vl");
  ONER_FAST_FEATURE("avx512vnni");
  ONER_FAST_FEATURE("avx512bf16");
#undef ONER_FAST_FEATURE
  unsigned a = 0, b = 0, c = 0, d = 0;  // older compilers have no name for these
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    if (d & (1u << 24)) found.append("amx_tile");
    if (d & (1u << 22)) found.append("amx_bf16");
  }
#endif
  return found;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled helpers of oner_fast that work on Python objects.";
  m.def("pack", &pack, py::arg("lists"));
  m.def("cpu_features", &cpu_features);
}
