/* The part of the CUDA driver that Triton's launcher calls, for a machine without a GPU: an sm_90
 * device that refuses what the driver API documents as wrong, and runs nothing. */
#include <cuda.h>
#include <stdint.h>
#include <string.h>

#define MOST_SHARED 232448
#define MOST_FUNCTIONS 4096

static int functions, shared_of[MOST_FUNCTIONS];
int stub_launches, stub_descriptors;

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = code == CUDA_ERROR_INVALID_IMAGE ? "refused: image" : "refused: value";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = MOST_SHARED; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = MOST_SHARED + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return memcmp(image, "\177ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (functions + 1 == MOST_FUNCTIONS) return CUDA_ERROR_OUT_OF_MEMORY;
  *function = (CUfunction)(uintptr_t)++functions;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  /* Drivers before CUDA 13 know no larger mode. */
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > MOST_SHARED)
    return CUDA_ERROR_INVALID_VALUE;
  shared_of[(uintptr_t)function] = value;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const cuuint64_t bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  const cuuint64_t widest[] = {256 * 4, 32, 64, 128}; /* by the swizzle */
  int wrong = (uintptr_t)address % 16 || box[0] * bytes % 16 || box[0] * bytes > widest[swizzle];
  for (cuuint32_t i = 0; i < rank; i++)
    wrong |= !sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > 256 || steps[i] != 1;
  for (cuuint32_t i = 0; i + 1 < rank; i++)
    wrong |= strides[i] % 16 || strides[i] >= 1ull << 40 || strides[i] < sizes[i] * bytes;
  memset(map, 0, sizeof *map);
  stub_descriptors++;
  return wrong ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *launch, CUfunction function, void **arguments,
                          void **extra) {
  uintptr_t number = (uintptr_t)function;
  unsigned shared = launch->sharedMemBytes;
  if (!number || number > (uintptr_t)functions) return CUDA_ERROR_INVALID_HANDLE;
  int wrong = launch->gridDimX > INT32_MAX || launch->gridDimY > 65535 || launch->gridDimZ > 65535;
  wrong |= launch->blockDimX > 1024 || shared > 49152 && (int)shared > shared_of[number];
  stub_launches++;
  return wrong ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

/* What succeeds and changes nothing. */
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 12080, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return *context = (CUcontext)1, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *launch) {
  return *count = 1, CUDA_SUCCESS;
}
