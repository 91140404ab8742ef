import pathlib, sys
from cupy.cuda import nvrtc
from cuflash.compiler import _complete_elf
import wgmma_text as w
here = pathlib.Path(__file__).parent; out = here / "cubins2"; out.mkdir(exist_ok=True)
def compile_(text, name, defs, ptx=False):
    p = nvrtc.createProgram(text, name + ".cu", (), ())
    try: nvrtc.compileProgram(p, ("-arch=compute_90a" if ptx else "-arch=sm_90a", "-std=c++17", "-default-device", *([] if ptx else ["--ptxas-options=-v"]), *[f"-D{d}" for d in defs]))
    except nvrtc.NVRTCError: sys.exit(nvrtc.getProgramLog(p)[:3000])
    if ptx: t = nvrtc.getPTX(p); return t if isinstance(t, str) else t.decode()
    log = nvrtc.getProgramLog(p)
    (out / f"{name}.cubin").write_bytes(_complete_elf(nvrtc.getCUBIN(p)))
    print(name, [l.strip()[14:] for l in log.splitlines() if "Used" in l or "spill" in l or "C75" in l], flush=True)
def fwd(D, G, N, st, tok, split, causal, ptx=False):
    text = (here / "forward2.cu").read_text().replace("//WGMMA", w.forward(D, N))
    return compile_(text, f"F_d{D}_g{G}_n{N}_s{st}_t{tok}_p{split}_c{causal}", [f"HD={D}", f"WG={G}", f"TN={N}", f"STAGES={st}", f"TOKEN={tok}", f"SPLIT={split}", f"CAUSAL={causal}"], ptx)
FWD = [(128,3,80,2,0,0),(128,3,80,2,1,0),(128,3,80,3,1,0),(128,3,80,2,2,0),(128,2,128,2,1,0),(128,2,128,2,2,0),(128,2,176,2,2,0),(128,2,160,2,0,0),
       (64,3,112,2,2,0),(64,3,112,2,1,0),(64,3,112,2,0,0),(64,3,128,2,2,0),(64,3,128,2,0,0),(64,3,96,3,0,0),(64,2,128,2,0,0),(64,2,192,2,2,0),
       (256,2,80,2,0,0),(256,2,80,2,1,0),(256,2,80,2,2,0),(256,2,80,2,0,1),(256,2,64,2,0,0)]
if __name__ == "__main__":
    for f in FWD:
        for c in (0, 1): fwd(*f, c)
    bt = (here / "backward2.cu").read_text()
    for c in (0, 1):
        for name, d in {"base": [], "nosplit": ["SPLIT=0"], "order1": ["ORDER=1"], "token": ["TOKEN=1"], "m64": ["TILE=64"]}.items():
            compile_(bt, f"B_c{c}_{name}", [f"CAUSAL={c}", *d])
