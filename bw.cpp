#include <immintrin.h>
#include <omp.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <chrono>
#include <sys/mman.h>
using C=std::chrono::steady_clock;
static double now(){return std::chrono::duration<double>(C::now().time_since_epoch()).count();}
// weights: L matrices 1536x576
const int64_t R=1536,K=576,L=120;
int main(){
 for(int huge=0;huge<2;huge++){
  size_t bytes=L*R*K*4; char*p=(char*)aligned_alloc(1<<21,(bytes+(1<<21)-1)>>21<<21); if(huge) madvise(p,bytes,MADV_HUGEPAGE); else madvise(p,bytes,MADV_NOHUGEPAGE); memset(p,1,bytes);
  float*w=(float*)p;
  for(int mode=0;mode<5;mode++) for(int rep=0;rep<2;rep++){
   double t=now(); float total=0;
   for(int l=0;l<L;l++){
    const float*m=w+l*R*K;
    #pragma omp parallel reduction(+:total)
    { int th=omp_get_thread_num(); __m512 s=_mm512_setzero_ps();
      if(mode==0){ // sequential by rows
        for(int64_t i=th*R/2;i<(th+1)*R/2;i++) for(int64_t j=0;j<K;j+=16) s=_mm512_add_ps(s,_mm512_loadu_ps(m+i*K+j));
      } else if(mode==1||mode==3){ // 16 lanes x 32 depth (read_lanes), rows split; mode 3 with prefetch of next panel
        for(int64_t i=th*R/2;i<(th+1)*R/2;i+=16) for(int64_t j=0;j<K;j+=32) for(int q=0;q<16;q++){
          if(mode==3){ _mm_prefetch((const char*)(m+(i+16+q)*K+j),_MM_HINT_T0); _mm_prefetch((const char*)(m+(i+16+q)*K+j+16),_MM_HINT_T0);}
          s=_mm512_add_ps(s,_mm512_loadu_ps(m+(i+q)*K+j)); s=_mm512_add_ps(s,_mm512_loadu_ps(m+(i+q)*K+j+16)); }
      } else if(mode==2||mode==4){ // read_depths: columns split over threads; 32 columns panel, all depth rows
        for(int64_t j=th*K/2;j<(th+1)*K/2;j+=32) for(int half=0;half<2;half++) for(int64_t i=0;i<R;i++){
          if(mode==4) _mm_prefetch((const char*)(m+(i+8)*K+j+half*16),_MM_HINT_T0);
          s=_mm512_add_ps(s,_mm512_loadu_ps(m+i*K+j+half*16)); }
      }
      total+=_mm512_reduce_add_ps(s);
    }
   }
   double d=now()-t; if(rep) printf("huge %d mode %d: %.1f ms %.1f GB/s (%g)\n",huge,mode,d*1e3,bytes/d/1e9,total);
  }
  free(p);
 }
}
