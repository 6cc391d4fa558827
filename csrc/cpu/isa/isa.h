// Rules for the sources of this folder: each is compiled once for every instruction set, which ONER_FAST_ISA names, and
// its kernels are reached through a table. It includes no library header that contains code, because an inline function
// compiled for a newer instruction set could be linked in for all. Everything except the table has internal linkage.
// avx512_bf16 and amx add products of bfloat16 numbers to avx512 and change nothing else: their tables begin as copies
// of avx512's, and sources without such products are not compiled for them.
#pragma once

#define ONER_FAST_JOIN_(a, b) a##b
#define ONER_FAST_JOIN(a, b) ONER_FAST_JOIN_(a, b)

// Declares `const Table& name()`, the kernels for this processor, and one function for each instruction set, from which
// capability.cpp chooses.
#ifdef ONER_FAST_X86
#define ONER_FAST_DECLARE_KERNELS(Table, name) \
  const Table& name##_portable();              \
  const Table& name##_avx2();                  \
  const Table& name##_avx512();                \
  const Table& name##_avx512_bf16();           \
  const Table& name##_amx();                   \
  const Table& name();
#else
#define ONER_FAST_DECLARE_KERNELS(Table, name) \
  const Table& name##_portable();              \
  const Table& name();
#endif

// Defines this instruction set's `name`.
#define ONER_FAST_DEFINE_KERNELS(Table, name, make)       \
  const Table& ONER_FAST_JOIN(name##_, ONER_FAST_ISA)() { \
    static const Table table = make();                    \
    return table;                                         \
  }
