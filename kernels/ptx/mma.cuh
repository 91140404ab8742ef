// Warp-level matrix products D = A B + C with float32 accumulation. PTX ISA 9.7.14 "mma".
//
// Lane l = 4 g + t (g = 0..7, t = 0..3). Accumulator of m16n8: c[0], c[1] = row g, columns 2t, 2t+1; c[2], c[3] = row g + 8.
#pragma once
#include "ptx/types.cuh"

#if __CUDA_ARCH__ >= 800
#define HAS_M16N8K16 1
#else
#define HAS_M16N8K16 0
#endif

// m16n8k16. A: a[0] row g, k 2t..; a[1] row g + 8; a[2], a[3] the same with k + 8. B: b[0] k 2t.., column g; b[1] k + 8.
// Turing has m16n8k8 only: two of them, since a[0..1], b[0] hold k = 0..7 and a[2..3], b[1] hold k = 8..15.
DEVICE void mma_m16n8k16(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2], float16) {
#if HAS_M16N8K16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

DEVICE void mma_m16n8k16(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2], bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// m16n8k8 on TF32. A: a[0] row g, k t; a[1] row g + 8, k t; a[2], a[3] the same with k + 4. B: b[0] k t, column g; b[1] k + 4.
DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
