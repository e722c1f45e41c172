// SPDX-License-Identifier: Apache-2.0
// Physical-limit references: in-process memcpy out of a shared memfd, process_vm_readv, raw TCP.
// usage: limit <cand> <W..> [...]
// cand: memcpy1 memcpy2 nt1 nt2 pvr1 pvr2 pvr1-thp pvr2-thp memcpy1-thp tcp1 tcp2 tcp1-cubic tcp2-cubic
#include "wl.h"
#include <pthread.h>
#include <sys/uio.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>
#include <immintrin.h>
#include <stdatomic.h>
#include <limits.h>
#include <sched.h>

static const wl_t *w; static char *src[64], *dst[64]; static uint64_t rsrc[64];
static desc_t *D; static int N; static pid_t target_pid;
static const char *cand; static int is_memcpy,is_nt,is_pvr,is_tcp,nthr,thp; static const char*cc;

__attribute__((target("avx"))) static void nt_copy(void*d,const void*s,size_t n){ // n multiple of 64, 32-aligned
  char*a=d; const char*b=s; for(size_t i=0;i<n;i+=128){ _mm_prefetch(b+i+1024,_MM_HINT_NTA); _mm_prefetch(b+i+1088,_MM_HINT_NTA);
    __m256i x0=_mm256_loadu_si256((const __m256i*)(b+i)),x1=_mm256_loadu_si256((const __m256i*)(b+i+32)),x2=_mm256_loadu_si256((const __m256i*)(b+i+64)),x3=_mm256_loadu_si256((const __m256i*)(b+i+96));
    _mm256_stream_si256((__m256i*)(a+i),x0);_mm256_stream_si256((__m256i*)(a+i+32),x1);_mm256_stream_si256((__m256i*)(a+i+64),x2);_mm256_stream_si256((__m256i*)(a+i+96),x3);} _mm_sfence(); }

// one share: bytes [lo,hi) of the concatenated descriptor list
static void work(size_t lo,size_t hi){
  struct iovec l[IOV_MAX], r[IOV_MAX]; int k=0; size_t q=0;
  for(int i=(int)(lo/w->blk);i<N;i++){ size_t b0=(size_t)i*w->blk; if(b0>=hi)break; size_t o=b0<lo?lo-b0:0, e=b0+w->blk>hi?hi-b0:w->blk; size_t len=e-o;
    char*dp=dst[D[i].t]+(size_t)D[i].d*w->blk+o; size_t so=(size_t)D[i].s*w->blk+o;
    if(is_memcpy) memcpy(dp,src[D[i].t]+so,len); else if(is_nt) nt_copy(dp,src[D[i].t]+so,len);
    else { l[k].iov_base=dp;l[k].iov_len=len;r[k].iov_base=(void*)(rsrc[D[i].t]+so);r[k].iov_len=len;k++;q+=len;
      if(k==IOV_MAX){ ssize_t g=process_vm_readv(target_pid,l,k,r,k,0); if(g!=(ssize_t)q){perror("pvr");_exit(4);} k=0;q=0; } } }
  if(k){ ssize_t g=process_vm_readv(target_pid,l,k,r,k,0); if(g!=(ssize_t)q){perror("pvr");_exit(4);} }
}
// A reference must not be the victim of its own spinning: each thread keeps to one core, and a spin gives way after 2,000 rounds.
static void pin(int core){ cpu_set_t c; CPU_ZERO(&c); CPU_SET(core,&c); sched_setaffinity(0,sizeof c,&c); }
static inline void relax(int*sp){ if(++*sp<2000) _mm_pause(); else { *sp=0; sched_yield(); } }
static _Atomic uint64_t go,done_; static size_t mid,tot;
static void*helper(void*_){ pin(1); uint64_t seen=0; for(;;){ uint64_t g; int sp=0; while((g=atomic_load_explicit(&go,memory_order_acquire))==seen) relax(&sp); seen=g; if(g==UINT64_MAX) return 0; work(mid,tot); atomic_store_explicit(&done_,g,memory_order_release);} }

// ---- tcp ----
static int sock[2]; // initiator side
typedef struct { uint32_t n; } hdr_t;
static void tune(int s){ int one=1; setsockopt(s,IPPROTO_TCP,TCP_NODELAY,&one,sizeof one); if(cc&&setsockopt(s,IPPROTO_TCP,TCP_CONGESTION,cc,strlen(cc))) perror("TCP_CONGESTION"); }
typedef struct { uint32_t t; uint32_t pad; uint64_t off,len; } req_t;
static void iov_all(int fd,struct iovec*v,int n,int wr){ while(n){ int m=n>IOV_MAX?IOV_MAX:n; ssize_t g=wr?writev(fd,v,m):readv(fd,v,m); if(g<=0){ if(g<0&&errno==EINTR)continue; if(g==0)_exit(0); perror(wr?"writev":"readv"); _exit(4);} while(g>0){ if((size_t)g>=v->iov_len){ g-=v->iov_len; v++; n--; } else { v->iov_base=(char*)v->iov_base+g; v->iov_len-=g; g=0; } } } }
static int xread_eof(int fd,void*b,size_t n){ char*p=b; while(n){ ssize_t r=read(fd,p,n); if(r<=0) return -1; p+=r;n-=r;} return 0; }
static void*tcp_server(void*a){ int fd=(int)(intptr_t)a; req_t*R=malloc(sizeof(req_t)*8192); struct iovec*v=malloc(sizeof(*v)*8192); uint32_t n;
  while(!xread_eof(fd,&n,4)){ if(xread_eof(fd,R,n*sizeof(req_t)))break; for(uint32_t i=0;i<n;i++){ v[i].iov_base=src[R[i].t]+R[i].off; v[i].iov_len=R[i].len; } iov_all(fd,v,n,1);} return 0; }
static void tcp_pull(int fd,size_t lo,size_t hi){ static __thread req_t*R; static __thread struct iovec*v; static __thread char*buf; if(!R){ buf=malloc(4+sizeof(req_t)*8192); R=(req_t*)(buf+4); v=malloc(sizeof(*v)*8192);} uint32_t k=0;
  for(int i=(int)(lo/w->blk);i<N;i++){ size_t b0=(size_t)i*w->blk; if(b0>=hi)break; size_t o=b0<lo?lo-b0:0, e=b0+w->blk>hi?hi-b0:w->blk;
    R[k].t=D[i].t; R[k].off=(size_t)D[i].s*w->blk+o; R[k].len=e-o; v[k].iov_base=dst[D[i].t]+(size_t)D[i].d*w->blk+o; v[k].iov_len=e-o; k++; }
  memcpy(buf,&k,4); xwrite(fd,buf,4+k*sizeof(req_t)); iov_all(fd,v,k,0); }
static void*tcp_helper(void*_){ uint64_t seen=0; for(;;){ uint64_t g; int sp=0; while((g=atomic_load_explicit(&go,memory_order_acquire))==seen){ if(++sp>2000){ sp=0; sched_yield(); } } seen=g; if(g==UINT64_MAX) return 0; tcp_pull(sock[1],mid,tot); atomic_store_explicit(&done_,g,memory_order_release);} }

static uint64_t callno;
static void call(void){ tot=wl_bytes(w); mid=tot; if(nthr==2){ mid=N>1?(size_t)(N/2)*w->blk:tot/2; mid&=~(size_t)4095; }
  if(nthr==2&&mid<tot) atomic_store_explicit(&go,++callno,memory_order_release);
  if(is_tcp) tcp_pull(sock[0],0,mid); else work(0,mid);
  if(nthr==2&&mid<tot){ int sp=0; while(atomic_load_explicit(&done_,memory_order_acquire)!=callno){ if(is_tcp){ if(++sp>200){sp=0;sched_yield();} } else relax(&sp); } } }

static void run(void){
  int sv[2]; socketpair(AF_UNIX,SOCK_STREAM,0,sv); size_t tb=wl_tensor_bytes(w);
  int fds[64]; int shm=is_memcpy||is_nt;
  if(shm) for(int t=0;t<w->ntensor;t++){ fds[t]=memfd_create("src",0); if(ftruncate(fds[t],tb)){perror("ftruncate");_exit(2);} }
  int lst=-1; struct sockaddr_in sa={.sin_family=AF_INET,.sin_addr.s_addr=htonl(INADDR_LOOPBACK)}; socklen_t sl=sizeof sa;
  if(is_tcp){ lst=socket(AF_INET,SOCK_STREAM,0); if(cc) tune(lst); bind(lst,(void*)&sa,sizeof sa); listen(lst,8); getsockname(lst,(void*)&sa,&sl); }
  pid_t tp=fork();
  if(!tp){ close(sv[0]); for(int t=0;t<w->ntensor;t++){ if(shm) src[t]=mmap(0,tb,PROT_READ|PROT_WRITE,MAP_SHARED,fds[t],0); else src[t]=alloc_mem(tb,thp); wl_fill(w,t,src[t]); }
    xwrite(sv[1],src,sizeof(src));
    if(is_tcp){ pthread_t th[2]; for(int i=0;i<nthr;i++){ int c=accept(lst,0,0); tune(c); pthread_create(&th[i],0,tcp_server,(void*)(intptr_t)c);} }
    char c; if(read(sv[1],&c,1)){} _exit(0); }
  close(sv[1]); target_pid=tp; xread(sv[0],rsrc,sizeof(rsrc));
  for(int t=0;t<w->ntensor;t++){ dst[t]=alloc_mem(tb,thp); if(shm) src[t]=mmap(0,tb,PROT_READ,MAP_SHARED|MAP_POPULATE,fds[t],0); }
  if(is_tcp) for(int i=0;i<nthr;i++){ sock[i]=socket(AF_INET,SOCK_STREAM,0); tune(sock[i]); if(connect(sock[i],(void*)&sa,sizeof sa)){perror("connect");_exit(2);} }
  N=wl_ndesc(w); D=malloc(sizeof(desc_t)*N); if(nthr==2&&!is_tcp) pin(0); pthread_t h; if(nthr==2) pthread_create(&h,0,is_tcp?tcp_helper:helper,0);
  uint64_t*v=calloc(w->iters,8);
  for(int i=-w->warm;i<w->iters;i++){ wl_gen(w,1000+i,D); uint64_t a=now_ns(); call(); uint64_t b=now_ns(); if(i==-w->warm) wl_verify(w,D,N,dst,cand); if(i>=0) v[i]=b-a; }
  wl_gen(w,99999,D); wl_zero_dst(w,D,N,dst); call(); wl_verify(w,D,N,dst,cand);
  emit(cand,w,"e2e",v,w->iters);
  if(nthr==2){ atomic_store(&go,UINT64_MAX); pthread_join(h,0);} close(sv[0]); int st; waitpid(tp,&st,0); _exit(0); }

int main(int c,char**a){ cand=a[1]; const char*n=cand; is_memcpy=!strncmp(n,"memcpy",6); is_nt=!strncmp(n,"nt",2); is_pvr=!strncmp(n,"pvr",3); is_tcp=!strncmp(n,"tcp",3);
  if(!(is_memcpy||is_nt||is_pvr||is_tcp)) return fprintf(stderr,"bad cand\n"),1; nthr=strchr(n,'2')?2:1; thp=strstr(n,"thp")!=0; if(strstr(n,"cubic")) cc="cubic"; if(strstr(n,"reno")) cc="reno";
  int rc=0; for(int i=2;i<c;i++){ w=wl_find(a[i]); fflush(stdout); pid_t p=fork(); if(!p) run(); int st; waitpid(p,&st,0); if(st){ fprintf(stderr,"FAIL %s %s status %x\n",cand,a[i],st); rc=1; } } return rc; }
