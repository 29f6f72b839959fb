// The vectors of the instruction set that this translation unit is compiled for.
//
// kernels_<isa>.cpp names its file of isa/ in ISA_HEADER; a kernel header opened on its own, as clangd does, gets the
// generic one.  Every file of isa/ defines the same names:
//
//   types      vf, vi, vb     a vector of float, of int32_t, of uint8_t
//              vb_quarter     a byte per float lane
//   constants  kW             float lanes of a vector
//              kRegisters     vector registers
//              kRun           bytes that one lane of add_distances sums
//   memory     load, store            unaligned
//              load_n, store_n        the first n <= kW lanes; the others are zero, or not written
//              stream                 to an aligned address, past the caches where the machine can
//              fence                  orders what was streamed before all later stores
//              widened                kW integers of 16 bits
//   floats     splat                  v in every lane
//              minimum                either operand may be returned when one is NaN
//              fused                  a*b + c, with one rounding where the machine has FMA
//              minimum_of, fused_of   minimum(splat(*p), b), fused(splat(*p), b, c)
//              accumulate             sum + v
//              difference<bool>       a - b; true: by the multiplier, where that is a port of its own
//              clamp_unit             clamp(z, -1, 1); a NaN becomes -1 or 1
//              any                    whether a lane of a comparison is true
//              even_lanes             lanes 0, 2, 4, ... of the concatenation (a, b)
//              transpose              v[i] lane j <-> v[j] lane i
//   bytes      splat_run              the kRun bytes at p in every lane
//              add_distances          sum + the sums of |a - b| over each run of kRun bytes
//              join_parts             kW sums of add_distances, in the order of the filters
//              rounded                nearest integers of -255 <= z <= 255, ties to even, in the low byte at least
//              low_bytes              the low byte of each lane; all of it that rounded() makes fits there
//              store_low_bytes        the low bytes of four vectors to p, p + pitch, ...
//
// All kernel code lies in the anonymous namespace of its translation unit, and no header of the C++ library is
// included: an inline function compiled for AVX-512 that the linker kept for everybody would crash elsewhere.
#pragma once

#if !defined(ISA_HEADER)
#define ISA_HEADER "isa/generic.h"
#endif
#include ISA_HEADER
