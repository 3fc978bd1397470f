// A CUDA runtime for a machine without a GPU: enough of it that PyTorch believes in one, on which no kernel runs.
//
// Preloaded, it stands in for these functions of libcudart, and by its soname for the driver's library. Memory of the
// GPU is the host's. A copy between it and pinned memory is made when somebody waits for it, as late as CUDA may make
// it: who reads sooner, or gives its source away sooner, gets wrong bytes. Calls that are not here fail for want of a
// driver.

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_READY = 600, NOT_SUPPORTED = 801 };
enum { UNKNOWN = 0, PINNED = 1, DEVICE = 2 };  // cudaMemoryType
enum { MOST = 1 << 16 };
#define DOES_NOTHING(name) int name() { return SUCCESS; }

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { char *start; size_t bytes; int kind; } blocks[MOST];
static struct { void *to; const void *from; size_t bytes; } pending[MOST];
static int num_blocks, num_pending, last_error;

static int finish(void) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < num_pending; i++) memcpy(pending[i].to, pending[i].from, pending[i].bytes);
  num_pending = 0;
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

static int kind_of(const void *address) {
  const char *place = address;
  for (int i = 0; i < num_blocks; i++)
    if (blocks[i].start <= place && place < blocks[i].start + blocks[i].bytes) return blocks[i].kind;
  return UNKNOWN;
}

static int allocate(void **address, size_t bytes, int kind) {
  if (num_blocks == MOST || posix_memalign(address, 512, bytes)) return OUT_OF_MEMORY;
  blocks[num_blocks].start = *address;
  blocks[num_blocks].bytes = bytes;
  blocks[num_blocks++].kind = kind;
  return SUCCESS;
}

int cudaMalloc(void **address, size_t bytes) { return allocate(address, bytes, DEVICE); }
int cudaHostAlloc(void **address, size_t bytes) { return allocate(address, bytes, PINNED); }
int cudaFree(void *address) { return finish(); }  // blocks stay until the process ends
int cudaFreeHost(void *address) { return finish(); }

int cudaMemcpyAsync(void *to, const void *from, size_t bytes) {
  if (kind_of(to) == UNKNOWN || kind_of(from) == UNKNOWN || num_pending == MOST) {  // CUDA, too, waits for pageable memory
    finish();
    memcpy(to, from, bytes);
    return SUCCESS;
  }
  pthread_mutex_lock(&lock);
  pending[num_pending].to = to;
  pending[num_pending].from = from;
  pending[num_pending++].bytes = bytes;
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int cudaMemsetAsync(void *to, int value, size_t bytes) { finish(); memset(to, value, bytes); return SUCCESS; }
int cudaStreamSynchronize(void *stream) { return finish(); }
int cudaDeviceSynchronize(void) { return finish(); }
int cudaEventSynchronize(void *event) { return finish(); }
int cudaStreamQuery(void *stream) { return num_pending ? NOT_READY : SUCCESS; }
int cudaEventQuery(void *event) { return num_pending ? NOT_READY : SUCCESS; }
int cudaLaunchKernel() { return last_error = NOT_SUPPORTED; }
int cudaPeekAtLastError(void) { return last_error; }

int cudaGetLastError(void) {
  int error = last_error;
  last_error = SUCCESS;
  return error;
}

struct Attributes { int kind, device; void *on_device, *on_host; };

int cudaPointerGetAttributes(struct Attributes *found, const void *address) {
  found->kind = kind_of(address);
  found->device = 0;
  found->on_device = found->on_host = (void *)address;
  return SUCCESS;
}

int cudaGetDeviceProperties_v2(char *properties, int device) {
  memset(properties, 0, 1024);
  strcpy(properties, "no GPU");
  *(int *)(properties + 360) = 9;  // compute capability 9.0
  *(int *)(properties + 388) = 132;  // multiprocessors
  return SUCCESS;
}

int cudaGetDeviceCount(int *count) { *count = 1; return SUCCESS; }
int cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = 99999; return SUCCESS; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = *most = 0; return SUCCESS; }
int cudaDeviceCanAccessPeer(int *can) { *can = 0; return SUCCESS; }
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = 1ul << 37; return SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *is) { *is = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo_v2(void *stream, int *is) { *is = 0; return SUCCESS; }
int cudaStreamCreateWithPriority(void **stream) { *stream = malloc(1); return SUCCESS; }
int cudaEventCreateWithFlags(void **event) { *event = malloc(1); return SUCCESS; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *active = 1; return SUCCESS; }

DOES_NOTHING(cudaEventDestroy)
DOES_NOTHING(cudaEventRecord)
DOES_NOTHING(cudaEventRecordWithFlags)
DOES_NOTHING(cudaSetDevice)
DOES_NOTHING(cudaStreamWaitEvent)
DOES_NOTHING(cudaThreadExchangeStreamCaptureMode)
