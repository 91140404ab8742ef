"""Hopper experiments beside cuDNN, interleaved: rounds of every contender, since the card is limited by its power. Worker prints JSON lines; the parent restarts it behind what hangs.

    python gpu2.py OUT.jsonl SECONDS
"""
import ctypes, json, math, os, pathlib, queue, re, subprocess, sys, threading, time
here = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here.parent / "benchmarks")]
LOG2E = math.log2(math.e)
names = sorted(p.stem for p in (here / "cubins2").glob("*.cubin"))
LENS = (16384, 8192, 4096, 2048, 1024, 512)
# cells: (pass, D, causal, S); the parent hands a worker the cells and contenders that are left
cells = [(w, D, c, S) for S in LENS for D in (128, 64, 256) for c in (0, 1) for w in ("F", "B") if w == "F" or D == 128]

def worker(begin, bad):
    import torch, cupy
    from torch.nn.attention import sdpa_kernel, SDPBackend
    F = torch.nn.functional
    cuda = ctypes.CDLL("libcuda.so.1"); dev = torch.device("cuda"); torch.zeros(1, device=dev)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    def tmap(x, rows, slabs):
        B, S, H, D = x.shape
        buf = (ctypes.c_char * 256)(); addr = (ctypes.addressof(buf) + 63) & ~63
        u64, u32 = ctypes.c_uint64, ctypes.c_uint32
        r = cuda.cuTensorMapEncodeTiled(ctypes.c_void_p(addr), 9, 5, ctypes.c_void_p(x.data_ptr()), (u64 * 5)(64, S, D // 64, H, B), (u64 * 4)(H * D * 2, 128, D * 2, S * H * D * 2), (u32 * 5)(64, rows, slabs, 1, 1), (u32 * 5)(1, 1, 1, 1, 1), 0, 3, 2, 0)
        assert r == 0, r
        return ctypes.string_at(addr, 128)
    modules = {}
    def launcher(name, entry, shared, grid, threads, maps, fmt, rest):
        if name not in modules:
            mod = cupy.RawModule(path=str(here / "cubins2" / f"{name}.cubin")); f = mod.get_function(entry); f.max_dynamic_shared_size_bytes = shared; modules[name] = (mod, f, f.kernel.ptr)
        bufs = []
        for m in maps:
            b = (ctypes.c_char * 256)(); a = (ctypes.addressof(b) + 63) & ~63; ctypes.memmove(a, m, 128); bufs.append((b, a))
        vals = [{"Q": ctypes.c_uint64, "i": ctypes.c_int, "f": ctypes.c_float}[ch](v) for ch, v in zip(fmt, rest)]
        ptrs = (ctypes.c_void_p * (len(maps) + len(vals)))(*[a for _, a in bufs], *[ctypes.addressof(v) for v in vals])
        ptr = modules[name][2]
        def go(keep=(bufs, vals, ptrs)): cupy.cuda.driver.launchKernel(ptr, grid, 1, 1, threads, 1, 1, shared, torch.cuda.current_stream().cuda_stream, ctypes.addressof(ptrs), 0)
        return go
    def ref(q, k, v, do, causal):
        q, k, v, do = (x.double().transpose(1, 2) for x in (q, k, v, do)); S, D = q.shape[2:]
        s = q @ k.transpose(2, 3) / math.sqrt(D)
        if causal: s = s.masked_fill(~torch.ones(S, S, dtype=torch.bool, device=dev).tril(), -math.inf)
        lse = torch.logsumexp(s, -1); p = torch.exp(s - lse[..., None]); out = p @ v; delta = (do * out).sum(-1)
        ds = p * (do @ v.transpose(2, 3) - delta[..., None]); back = lambda x: x.transpose(1, 2)
        return back(out), lse, delta, back(ds @ k / math.sqrt(D)), back(ds.transpose(2, 3) @ q / math.sqrt(D)), back(p.transpose(2, 3) @ do)
    def arrays(B, S, H, D, seed=0):
        g = torch.Generator(dev).manual_seed(seed)
        return [torch.randn(B, S, H, D, generator=g, device=dev).to(torch.bfloat16) for _ in range(4)]
    rel = lambda a, b: float((a.double() - b.double()).norm() / b.double().norm())
    def fwd(name, q, k, v, section=None, snake=False):
        B, S, H, D = q.shape; G, N, st = (int(re.search(p, name)[1]) for p in (r"_g(\d+)", r"_n(\d+)", r"_s(\d+)")); M = 64 * G; tm = -(-S // M)
        if section is None: section = max(1, min(B * H, (24 << 20) // (S * D * 4))); section = min(B * H, max(section, -(-sms // tm)))
        out = torch.full_like(q, math.nan); lse = torch.full((B, H, S), math.nan, device=dev)
        go = launcher(name, "attention_forward", 2 * M * D + 4 * st * N * D, min(sms, tm * H * B), 128 * (G + 1), [tmap(q, M, D // 64), tmap(k, N, D // 64), tmap(v, N, D // 64), tmap(out, 16, 1)], "Qiiifii", (lse.data_ptr(), S, H, B, LOG2E / math.sqrt(D), section, int(snake)))
        return go, out, lse
    def bwd(name, q, k, v, do, lse, delta, section=None):
        B, S, H, D = q.shape; M = 64 if "m64" in name else 80; t = -(-S // M); st = 2
        if section is None: section = max(1, min(B * H, (32 << 20) // (S * D * 8))); section = min(B * H, max(section, -(-sms // -(-S // 128))))
        def rows(x, fill):
            r = torch.full((B, H, t * M), fill, device=dev); r[..., :S] = x
            return r.reshape(B, H, t * M // 16, 2, 4, 2).transpose(3, 4).reshape(r.shape).contiguous()
        l, d = rows(lse.float() * LOG2E, math.inf), rows(delta.float(), 0.0)
        dk, dv = torch.full_like(k, math.nan), torch.full_like(v, math.nan)
        acc = torch.zeros(B, H, t, 2, M // 8, 128, 4, device=dev)
        go = launcher(name, "attention_backward", 4 * 128 * 128 + (4 * st + 4) * M * 128 + 8 * st * M, -(-S // 128) * H * B, 384, [tmap(q, M, 2), tmap(k, 128, 2), tmap(v, 128, 2), tmap(do, M, 2), tmap(dk, 16, 1), tmap(dv, 16, 1)], "QQQiiiffi", (l.data_ptr(), d.data_ptr(), acc.data_ptr(), S, H, B, LOG2E / math.sqrt(D), 1 / math.sqrt(D), section))
        def dq():
            x = acc.reshape(B, H, t, 2, M // 8, 4, 8, 4, 2, 2)
            return x.permute(0, 2, 4, 7, 9, 1, 3, 5, 8, 6).reshape(B, t * M, H, 128)[:, :S] / math.sqrt(128)
        go.keep2 = None
        return go, dq, dk, dv, (l, d, acc)
    from bench.machine import Monitor
    bus = cupy.cuda.runtime.deviceGetPCIBusId(0); mon = Monitor(bus.decode() if isinstance(bus, bytes) else bus)
    def batch(fn, n):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        for _ in range(n): fn()
        b.record(); clock, watts = mon.sm_clock(), mon.watts(); torch.cuda.synchronize()
        return a.elapsed_time(b) / n, clock, watts
    say = lambda **d: print(json.dumps(d), flush=True)
    checked = {}
    def check(name, D, c):
        if name in checked: return
        errs = []
        for S, B, H in ((1000, 2, 2), (257, 2, 3)):
            qs = arrays(B, S, H, D); want = ref(*qs, c)
            if name[0] == "F":
                go, out, lse = fwd(name, *qs[:3], section=3); go(); torch.cuda.synchronize(); errs.append([rel(out, want[0]), float((lse.double() - want[1]).abs().max())])
            else:
                go, dq, dk, dv, keep = bwd(name, *qs, want[1], want[2], section=3); go(); torch.cuda.synchronize(); errs.append([rel(a, b) for a, b in zip((dq(), dk, dv), want[3:])])
        checked[name] = errs; say(what="check", name=name, errors=errs)
        assert all(e[0] < 6e-3 for e in errs), errs
    x = torch.randn(8192, 8192, device=dev, dtype=torch.bfloat16); t0 = time.time()
    while time.time() - t0 < 0.7: x @ x; torch.cuda.synchronize()
    if begin == 0: say(what="matmul", tflops=2 * 8192**3 / batch(lambda: x @ x, 60)[0] / 1e9, clock=mon.sm_clock())
    for index, (w, D, c, S) in enumerate(cells):
        if index < begin: continue
        B, H = 16384 // S, 2048 // D; q, k, v, do = arrays(B, S, H, D); qt, kt, vt, dot = (z.transpose(1, 2) for z in (q, k, v, do))
        flops = 4 * B * H * S * S * D * (0.5 * (1 + 1 / S) if c else 1) * (2.5 if w == "B" else 1)
        run, keep = {}, []
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            ql, kl, vl = (z.detach().requires_grad_() for z in (qt, kt, vt))
            try:
                if w == "F":
                    def cudnn():
                        with torch.no_grad(): F.scaled_dot_product_attention(qt, kt, vt, is_causal=bool(c))
                    run["cudnn"] = cudnn; run["cudnn_lse"] = lambda: F.scaled_dot_product_attention(ql, kl, vl, is_causal=bool(c))
                else:
                    o = F.scaled_dot_product_attention(ql, kl, vl, is_causal=bool(c)); run["cudnn"] = lambda: torch.autograd.grad(o, (ql, kl, vl), dot, retain_graph=True)
                for f in run.values(): f()
            except Exception as e: say(what="cudnn", error=str(e)[:200]); run = {}
            lse = torch.full((B, H, S), math.log(S), device=dev); delta = torch.zeros(B, H, S, device=dev)
            for name in names:
                if name[0] != w or f"_c{c}" not in name or (w == "F" and f"_d{D}_" not in name) or name in bad: continue
                if S not in (16384, 4096, 1024) and name.startswith("B") and not name.endswith("base"): continue
                say(begin=index, name=name)
                try:
                    check(name, D, c)
                    main = name in ("F_d128_g3_n80_s2_t1_p0_c0", "F_d128_g3_n80_s2_t1_p0_c1") or name.endswith("base")
                    variants = [(None, False), *([(B * H, False)] if main else []), *([(None, True)] if c and w == "F" else [])]
                    for section, snake in variants:
                        made = fwd(name, q, k, v, section, snake) if w == "F" else bwd(name, q, k, v, do, lse, delta, section)
                        keep.append(made); made[0](); torch.cuda.synchronize(); run[name + ("" if section is None else "_allheads") + ("_snake" if snake else "")] = made[0]
                except Exception as e:
                    say(what="error", name=name, error=f"{type(e).__name__}: {e}"[:300])
                    try: torch.cuda.synchronize()
                    except Exception: os._exit(75)
            say(begin=index, name="timing")
            got = {n: [] for n in run}; clocks = {n: [] for n in run}
            each = flops / 600e12
            for _ in range(4):
                for n, f in run.items():
                    ms, clock, watts = batch(f, max(2, min(30, int(0.006 / each)))); got[n].append(flops / ms / 1e9); clocks[n].append((clock, watts))
        say(what="cell", which=w, D=D, causal=c, S=S, tflops={n: [round(x, 1) for x in sorted(t)] for n, t in got.items()}, clocks={n: t[-1] for n, t in clocks.items()})
        del run, keep

if len(sys.argv) > 1 and sys.argv[1] == "worker": worker(int(sys.argv[2]), sys.argv[3].split(",")); sys.exit()
out = open(sys.argv[1], "w"); deadline = time.time() + float(sys.argv[2]); begin, bad = 0, ["-"]
while begin < len(cells) and time.time() < deadline:
    p = subprocess.Popen([sys.executable, __file__, "worker", str(begin), ",".join(bad)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = queue.Queue(); threading.Thread(target=lambda: ([lines.put(l) for l in p.stdout], lines.put(None)), daemon=True).start()
    current, name, done = begin, "", False
    try:
        while True:
            line = lines.get(timeout=max(0.1, min(20, deadline - time.time())))
            if line is None: break
            if line.startswith("{"):
                d = json.loads(line)
                if "begin" in d: current, name = d["begin"], d["name"]
                else:
                    out.write(line); out.flush()
                    if d["what"] == "cell":
                        begin = current + 1; print(d["which"], d["D"], "causal" if d["causal"] else "full", d["S"], {n: t[len(t) // 2] for n, t in d["tflops"].items()}, flush=True)
                    else: print(line[:250].rstrip(), flush=True)
            else: print("  |", line.rstrip()[:300], flush=True)
        done = p.wait() == 0
    except queue.Empty: print(f"NOTHING from {name}: hangs or out of time", flush=True)
    p.kill(); p.wait()
    if done: break
    bad.append(name)
