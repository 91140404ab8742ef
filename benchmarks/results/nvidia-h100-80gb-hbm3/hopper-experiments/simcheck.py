import sys, struct, numpy as np, ml_dtypes, time
sys.path[:0]=[".."]
import build2
from cuflash.simulator import Module, Options, Buffer
from cuflash.simulator.tensor_map import encode_tiled
def run(D,G,N,st,tok,sp,c,S=300,B=1,H=3,section=2,blocks=4,snake=1):
    M=64*G; rng=np.random.default_rng(0)
    q,k,v=[(rng.standard_normal((B,S,H,D))).astype(ml_dtypes.bfloat16) for _ in range(3)]
    mod=Module(build2.fwd(D,G,N,st,tok,sp,c,ptx=True))
    def one(x,rows,slabs): return encode_tiled(x.ctypes.data,'bfloat16',(64,S,D//64,H,B),(H*D*2,128,D*2,S*H*D*2),(64,rows,slabs,1,1),swizzle='128B')
    qd,kd,vd=(x.astype(np.float64).transpose(0,2,1,3) for x in (q,k,v)); s=qd@kd.transpose(0,1,3,2)*D**-.5
    if c: s=np.where(np.tril(np.ones((S,S),bool)),s,-np.inf)
    m=s.max(-1,keepdims=True); p=np.exp(s-m); l=p.sum(-1,keepdims=True); want=(p/l@vd).transpose(0,2,1,3); wl=(m+np.log(l))[...,0]
    for o in (Options(schedule='late'),Options(schedule='random',seed=1),Options(schedule='random',seed=2)):
        out=np.full_like(q,np.nan); lse=np.full((B,H,S),np.nan,np.float32)
        par=one(q,M,D//64)+one(k,N,D//64)+one(v,N,D//64)+one(out,16,1)+struct.pack('<Qiiifii',lse.ctypes.data,S,H,B,D**-.5*np.log2(np.e),section,snake)
        bufs=[Buffer(x.ctypes.data,x.nbytes,n) for x,n in ((q,'q'),(k,'k'),(v,'v'),(out,'out'),(lse,'lse'))]
        t=time.time(); mod.launch((min(blocks,-(-S//M)*H*B),1,1),(128*(G+1),1,1),2*M*D+4*st*N*D,par,bufs,o)
        e=np.abs(out.astype(np.float64)-want).max(); print(D,G,N,st,tok,sp,c,o.schedule,'err',e,np.abs(lse-wl).max(),round(time.time()-t,1),flush=True)
        assert e<0.02
