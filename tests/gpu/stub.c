/* A CUDA runtime for a machine without a GPU.
 *
 * Device memory is host memory mapped on demand; copies between host and device are real; kernels, copies within the
 * device and memset do nothing (emulation.py computes the values). Every other symbol that torch wants is generated and
 * returns 0. Environment: STUB_GPU_MEMORY (GB), STUB_GPU_CAPABILITY (such as 9.0), STUB_GPU_COUNT.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#define API __attribute__((visibility("default")))
#define CALL API cudaError_t
#define MAX_BLOCKS (1 << 16)
#define MAX_DEVICES 8

typedef struct { char *start; size_t size; int device; } Block; /* device -1: pinned memory of the host */
static Block blocks[MAX_BLOCKS];
static int num_blocks = 0;
static size_t used[MAX_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int current = 0;
static long launches = 0;

static double setting(const char *name, double otherwise) {
  const char *text = getenv(name);
  return text ? atof(text) : otherwise;
}
static size_t total(void) { return (size_t)(setting("STUB_GPU_MEMORY", 80) * 1e9); }
static int capability(void) { return (int)(setting("STUB_GPU_CAPABILITY", 9.0) * 10 + 0.5); }
static int count(void) { return (int)setting("STUB_GPU_COUNT", 1); }
API long stub_launches(void) { return launches; }

/* --- memory */
static Block *block_of(const void *p) { /* with the lock held */
  for (int i = num_blocks - 1; i >= 0; i--)
    if ((char *)p >= blocks[i].start && (char *)p < blocks[i].start + blocks[i].size) return &blocks[i];
  return NULL;
}
static cudaError_t allocate(void **p, size_t size, int device) {
  cudaError_t error = cudaErrorMemoryAllocation;
  pthread_mutex_lock(&lock);
  *p = NULL;
  if (num_blocks < MAX_BLOCKS && (device < 0 || used[device] + size <= total())) {
    char *start = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start != MAP_FAILED) {
      blocks[num_blocks++] = (Block){start, size ? size : 1, device};
      if (device >= 0) used[device] += size;
      *p = start;
      error = cudaSuccess;
    }
  }
  pthread_mutex_unlock(&lock);
  return error;
}
static cudaError_t release(void *p) {
  pthread_mutex_lock(&lock);
  Block *block = p ? block_of(p) : NULL;
  if (block) {
    munmap(block->start, block->size);
    if (block->device >= 0) used[block->device] -= block->size;
    *block = blocks[--num_blocks];
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
CALL cudaMalloc(void **p, size_t size) { return allocate(p, size, current); }
CALL cudaFree(void *p) { return release(p); }
CALL cudaHostAlloc(void **p, size_t size, unsigned flags) { return allocate(p, size, -1); }
CALL cudaMallocHost(void **p, size_t size) { return allocate(p, size, -1); }
CALL cudaFreeHost(void *p) { return release(p); }
CALL cudaMemGetInfo(size_t *free, size_t *all) {
  *all = total();
  *free = *all - used[current];
  return cudaSuccess;
}
CALL cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  pthread_mutex_lock(&lock);
  Block *block = block_of(p);
  a->type = !block ? cudaMemoryTypeUnregistered : block->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  a->device = block && block->device >= 0 ? block->device : current;
  a->devicePointer = a->hostPointer = (void *)p;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
static cudaError_t copy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  struct cudaPointerAttributes there, here;
  cudaPointerGetAttributes(&there, to);
  cudaPointerGetAttributes(&here, from);
  if (there.type != cudaMemoryTypeDevice || here.type != cudaMemoryTypeDevice) memmove(to, from, size);
  return cudaSuccess;
}
CALL cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) { return copy(to, from, n, kind); }
CALL cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s) {
  return copy(to, from, n, kind);
}

/* --- devices */
CALL cudaGetDeviceCount(int *n) { *n = count(); return cudaSuccess; }
CALL cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
CALL cudaSetDevice(int device) {
  if (device < 0 || device >= count()) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}
CALL cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stub GPU");
  p->totalGlobalMem = total();
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = p->totalConstMem = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->l2CacheSize = 50 << 20;
  p->textureAlignment = 512;
  p->unifiedAddressing = p->concurrentKernels = 1;
  return cudaSuccess;
}
CALL cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
CALL cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return cudaSuccess; }
CALL cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
CALL cudaDeviceGetPCIBusId(char *id, int size, int device) { snprintf(id, size, "0000:%02x:00.0", device); return 0; }
CALL cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
CALL cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
API const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : error == cudaErrorInvalidDevice
         ? "invalid device ordinal" : "error of the stub GPU";
}
API const char *cudaGetErrorName(cudaError_t error) { return "stubError"; }

/* --- streams and events: everything is done at once; an event knows when it was recorded */
static void *handle(void) { return calloc(1, 64); }
CALL cudaStreamCreate(cudaStream_t *s) { *s = handle(); return cudaSuccess; }
CALL cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { *s = handle(); return cudaSuccess; }
CALL cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int p) { *s = handle(); return cudaSuccess; }
CALL cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return cudaSuccess; }
CALL cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) { *c = 0; return cudaSuccess; }
CALL cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *id, cudaGraph_t *g,
                              const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) {
  *c = 0;
  if (id) *id = 0;
  return cudaSuccess;
}
CALL cudaEventCreate(cudaEvent_t *e) { *e = handle(); return cudaSuccess; }
CALL cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = handle(); return cudaSuccess; }
static cudaError_t record(cudaEvent_t e) { clock_gettime(CLOCK_MONOTONIC, (struct timespec *)e); return cudaSuccess; }
CALL cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return record(e); }
CALL cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return record(e); }
CALL cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  struct timespec *a = (struct timespec *)from, *b = (struct timespec *)to;
  *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6;
  return cudaSuccess;
}

/* --- kernels */
CALL cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) { launches++; return 0; }
CALL cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { launches++; return 0; }
CALL __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) { launches++; return 0; }
CALL __cudaGetKernel(cudaKernel_t *kernel, const void *f) { *kernel = (cudaKernel_t)f; return cudaSuccess; }
CALL __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *m, void *s) {
  *g = *b = (dim3){1, 1, 1};
  *m = 0;
  *(void **)s = NULL;
  return cudaSuccess;
}
API void **__cudaRegisterFatBinary(void *binary) { static void *one[4]; return one; }
CALL cudaGetSymbolAddress(void **p, const void *symbol) { static char room[1 << 16]; *p = room; return cudaSuccess; }
CALL cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = capability();
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
CALL cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t m) { *n = 2; return 0; }
CALL cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t m, unsigned x) {
  *n = 2;
  return cudaSuccess;
}

/* --- the driver, as far as the runtime hands out its functions */
static int nothing(void) { return 0; }
static int context_state(int device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
CALL cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                      enum cudaDriverEntryPointQueryResult *result) {
  *f = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)nothing : (void *)context_state;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

/* --- cuBLAS */
API int cublasCreate_v2(void **h) { *h = handle(); return 0; }
API int cublasLtCreate(void **h) { *h = handle(); return 0; }
API int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
API int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
API int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int n, void *r,
                                       int *found) {
  *found = 1;
  return 0;
}
