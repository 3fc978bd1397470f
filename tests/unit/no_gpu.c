// A CUDA runtime for a machine without a GPU: enough of it that PyTorch believes in two, on which no kernel runs.
//
// Preloaded, it stands in for these functions of libcudart, CUDA 12's and CUDA 13's, and by its soname for the driver's
// library. Memory of the GPUs is the host's. A copy between it and pinned memory is made when somebody waits for that
// GPU, as late as CUDA may make it: who reads sooner, or gives its source away sooner, gets wrong bytes. Calls that are
// not here fail for want of a driver.

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_READY = 600, NOT_SUPPORTED = 801 };
enum { UNKNOWN = 0, PINNED = 1, DEVICE = 2 };  // cudaMemoryType
enum { MOST = 1 << 16 };
#define DOES_NOTHING(name) int name() { return SUCCESS; }

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
enum { GPUS = 2 };
struct block { char *start; size_t bytes; int kind, device; };
static struct block blocks[MOST];
static struct { void *to; const void *from; size_t bytes; int device; } pending[MOST];
static int num_blocks, num_pending, last_error;
static __thread int current;  // device

// Make the copies of one GPU, in order; those of others stay.
static int finish(int device) {
  pthread_mutex_lock(&lock);
  int left = 0;
  for (int i = 0; i < num_pending; i++) {
    if (pending[i].device == device) memcpy(pending[i].to, pending[i].from, pending[i].bytes);
    else pending[left++] = pending[i];
  }
  num_pending = left;
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

static int finish_all(void) {
  for (int device = 0; device < GPUS; device++) finish(device);
  return SUCCESS;
}

static int is_pending(int device) {
  for (int i = 0; i < num_pending; i++)
    if (pending[i].device == device) return NOT_READY;
  return SUCCESS;
}

static struct block block_of(const void *address) {
  const char *place = address;
  for (int i = 0; i < num_blocks; i++)
    if (blocks[i].start <= place && place < blocks[i].start + blocks[i].bytes) return blocks[i];
  return (struct block){NULL, 0, UNKNOWN, 0};
}

static int allocate(void **address, size_t bytes, int kind) {
  if (num_blocks == MOST || posix_memalign(address, 512, bytes)) return OUT_OF_MEMORY;
  blocks[num_blocks++] = (struct block){*address, bytes, kind, current};
  return SUCCESS;
}

int cudaMalloc(void **address, size_t bytes) { return allocate(address, bytes, DEVICE); }
int cudaHostAlloc(void **address, size_t bytes) { return allocate(address, bytes, PINNED); }
int cudaFree(void *address) { return finish_all(); }  // blocks stay until the process ends
int cudaFreeHost(void *address) { return finish_all(); }

int cudaMemcpyAsync(void *to, const void *from, size_t bytes) {
  int is_pageable = block_of(to).kind == UNKNOWN || block_of(from).kind == UNKNOWN;
  if (is_pageable || num_pending == MOST) {  // CUDA, too, waits then
    finish(current);
    memcpy(to, from, bytes);
    return SUCCESS;
  }
  pthread_mutex_lock(&lock);
  pending[num_pending].to = to;
  pending[num_pending].from = from;
  pending[num_pending].bytes = bytes;
  pending[num_pending++].device = current;
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int cudaMemsetAsync(void *to, int value, size_t bytes) { finish(current); memset(to, value, bytes); return SUCCESS; }
int cudaStreamSynchronize(void *stream) { return finish(current); }  // each GPU has one
int cudaStreamQuery(void *stream) { return is_pending(current); }
int cudaDeviceSynchronize(void) { return finish(current); }
int cudaEventCreateWithFlags(int **event) { *event = malloc(sizeof **event); return SUCCESS; }  // its device
int cudaEventRecord(int *event) { *event = current; return SUCCESS; }
int cudaEventRecordWithFlags(int *event) { *event = current; return SUCCESS; }
int cudaEventSynchronize(int *event) { return finish(*event); }
int cudaEventQuery(int *event) { return is_pending(*event); }
int cudaLaunchKernel() { return last_error = NOT_SUPPORTED; }
int __cudaLaunchKernel() { return last_error = NOT_SUPPORTED; }  // what code of CUDA 13's nvcc calls
int __cudaGetKernel(void **kernel, void *function) { *kernel = function; return SUCCESS; }  // and asks for first
int cudaPeekAtLastError(void) { return last_error; }

int cudaGetLastError(void) {
  int error = last_error;
  last_error = SUCCESS;
  return error;
}

struct Attributes { int kind, device; void *on_device, *on_host; };

int cudaPointerGetAttributes(struct Attributes *found, const void *address) {
  found->kind = block_of(address).kind;
  found->device = block_of(address).device;
  found->on_device = found->on_host = (void *)address;
  return SUCCESS;
}

static int describe(char *properties, size_t bytes, int at_multiprocessors) {
  memset(properties, 0, bytes);
  strcpy(properties, "no GPU");
  *(int *)(properties + 360) = 9;  // compute capability 9.0
  *(int *)(properties + at_multiprocessors) = 132;
  return SUCCESS;
}

// CUDA 12's structure has fields that CUDA 13's has not, one of them before the number of multiprocessors.
int cudaGetDeviceProperties_v2(char *properties) { return describe(properties, 1032, 388); }
int cudaGetDeviceProperties(char *properties) { return describe(properties, 1008, 384); }
int cudaGetDeviceCount(int *count) { *count = GPUS; return SUCCESS; }
int cudaGetDevice(int *device) { *device = current; return SUCCESS; }
int cudaSetDevice(int device) { current = device; return SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = 99999; return SUCCESS; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = *most = 0; return SUCCESS; }
int cudaDeviceCanAccessPeer(int *can) { *can = 0; return SUCCESS; }
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = 1ul << 37; return SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *is) { *is = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo_v2(void *stream, int *is) { *is = 0; return SUCCESS; }  // CUDA 12's
int cudaStreamGetCaptureInfo(void *stream, int *is) { *is = 0; return SUCCESS; }  // CUDA 13's
int cudaStreamCreateWithPriority(void **stream) { *stream = malloc(1); return SUCCESS; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *active = 1; return SUCCESS; }

DOES_NOTHING(cudaEventDestroy)
DOES_NOTHING(cudaStreamWaitEvent)
DOES_NOTHING(cudaThreadExchangeStreamCaptureMode)
