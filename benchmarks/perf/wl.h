// SPDX-License-Identifier: Apache-2.0
// Shared workload definitions for all peer harnesses (C11 / C++17).
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <errno.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <sys/socket.h>

typedef struct { const char *name; int ntensor; size_t blk; int nblk; int ncall; int warm; int iters; } wl_t;
// name, tensors, block bytes, blocks per tensor, blocks pulled per tensor per call, warm-up calls, timed calls
static const wl_t WL[] = {
  {"W1", 64, 32768,            512, 64,  3,   20},
  {"W2", 64, 32768,            512, 1,   50,  600},
  {"W3", 1,  16384,            512, 1,   200, 2500},
  {"W4", 1,  (size_t)1 << 30,  1,   1,   2,   10},
  {"W5", 61, 147456,           128, 32,  2,   15},
};
#define NWL 5
static inline const wl_t *wl_find(const char *n){ for(int i=0;i<NWL;i++) if(!strcmp(WL[i].name,n)) return &WL[i]; return NULL; }
static inline size_t wl_tensor_bytes(const wl_t*w){ return w->blk*(size_t)w->nblk; }
static inline int wl_ndesc(const wl_t*w){ return w->ntensor*w->ncall; }
static inline size_t wl_bytes(const wl_t*w){ return (size_t)wl_ndesc(w)*w->blk; }

typedef struct { int t; uint32_t s, d; } desc_t; // tensor, source block, destination block

static inline uint64_t now_ns(void){ struct timespec ts; clock_gettime(CLOCK_MONOTONIC,&ts); return (uint64_t)ts.tv_sec*1000000000ull+ts.tv_nsec; }

static inline uint64_t rng_next(uint64_t *s){ uint64_t z=(*s+=0x9E3779B97F4A7C15ull); z=(z^(z>>30))*0xBF58476D1CE4E5B9ull; z=(z^(z>>27))*0x94D049BB133111EBull; return z^(z>>31); }
static inline void pick(uint64_t *s, int n, int k, uint32_t *out){ // k distinct of n, random order
  static __thread uint32_t perm[4096]; for(int i=0;i<n;i++) perm[i]=i;
  for(int i=0;i<k;i++){ int j=i+(int)(rng_next(s)%(uint64_t)(n-i)); uint32_t x=perm[i]; perm[i]=perm[j]; perm[j]=x; out[i]=perm[i]; } }
// independent random distinct source and destination blocks in every tensor; tensor-major order
static inline void wl_gen(const wl_t *w, uint64_t seed, desc_t *d){
  uint64_t s=seed*0x2545F4914F6CDD1Dull+7; uint32_t a[4096],b[4096]; int n=0;
  for(int t=0;t<w->ntensor;t++){ pick(&s,w->nblk,w->ncall,a); pick(&s,w->nblk,w->ncall,b);
    for(int i=0;i<w->ncall;i++){ d[n].t=t; d[n].s=a[i]; d[n].d=b[i]; n++; } } }

static inline uint64_t pat(int t, uint64_t w){ return ((uint64_t)(t+1)*0x9E3779B97F4A7C15ull) ^ (w*0xBF58476D1CE4E5B9ull + 0x1234567ull); }
static inline void wl_fill(const wl_t*w,int t,void*p){ uint64_t n=wl_tensor_bytes(w)/8,*q=(uint64_t*)p; for(uint64_t i=0;i<n;i++) q[i]=pat(t,i); }
static inline void wl_verify(const wl_t*w,const desc_t*d,int n,char*const*dst,const char*what){
  for(int i=0;i<n;i++){ const uint64_t*q=(const uint64_t*)(dst[d[i].t]+(size_t)d[i].d*w->blk); uint64_t base=(uint64_t)d[i].s*w->blk/8;
    for(uint64_t j=0;j<w->blk/8;j++) if(q[j]!=pat(d[i].t,base+j)){ fprintf(stderr,"VERIFY FAIL %s %s desc %d word %llu\n",w->name,what,i,(unsigned long long)j); _exit(3);} } }
static inline void wl_zero_dst(const wl_t*w,const desc_t*d,int n,char**dst){ for(int i=0;i<n;i++) memset(dst[d[i].t]+(size_t)d[i].d*w->blk,0xEE,w->blk); }

static inline void *alloc_mem(size_t n,int thp){ void*p=NULL; if(posix_memalign(&p,thp?(2u<<20):4096,n)){perror("memalign");_exit(2);} if(thp) madvise(p,n,MADV_HUGEPAGE); memset(p,0xEE,n); return p; }

// samples -> CSV on stdout:  S,<cand>,<wl>,<metric>,<bytes>,<ns>...
static inline void emit(const char*cand,const wl_t*w,const char*metric,const uint64_t*v,int n){
  printf("S,%s,%s,%s,%zu",cand,w->name,metric,wl_bytes(w)); for(int i=0;i<n;i++) printf(",%llu",(unsigned long long)v[i]); printf("\n"); fflush(stdout); }

static inline void xwrite(int fd,const void*b,size_t n){ const char*p=(const char*)b; while(n){ ssize_t r=write(fd,p,n); if(r<=0){ if(r<0&&errno==EINTR)continue; perror("xwrite"); _exit(2);} p+=r;n-=r; } }
static inline void xread(int fd,void*b,size_t n){ char*p=(char*)b; while(n){ ssize_t r=read(fd,p,n); if(r<=0){ if(r<0&&errno==EINTR)continue; fprintf(stderr,"peer gone (pid %d)\n",getpid()); _exit(2);} p+=r;n-=r; } }
