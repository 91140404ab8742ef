def acc(n): return ",".join(f"%{i}" for i in range(n))
def outs(n): return ",".join(f'"+f"(d[{i}])' for i in range(n))
def ss(name, N, ta, tb):
    n = N // 2
    return (f'__device__ __forceinline__ void {name}(float (&d)[{n}], u64 a, u64 b, int scale_d) {{\n'
            f'    asm volatile("{{.reg .pred p; setp.ne.b32 p,%{n+2},0;\\nwgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{acc(n)}}},%{n},%{n+1},p,1,1,{ta},{tb};}}"\n'
            f'        : {outs(n)} : "l"(a),"l"(b),"r"(scale_d));\n}}\n')
def rs(name, N, tb):
    n = N // 2
    return (f'__device__ __forceinline__ void {name}(float (&d)[{n}], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int scale_d) {{\n'
            f'    asm volatile("{{.reg .pred p; setp.ne.b32 p,%{n+5},0;\\nwgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{acc(n)}}},{{%{n},%{n+1},%{n+2},%{n+3}}},%{n+4},p,1,1,{tb};}}"\n'
            f'        : {outs(n)} : "r"(a0),"r"(a1),"r"(a2),"r"(a3),"l"(b),"r"(scale_d));\n}}\n')
def forward(D, N): return ss("multiply_scores", N, 0, 0) + rs("multiply_values", D, 1)
