// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE // dladdr

#include "shim.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Every function of the header, also those that Go doesn't call: a face that lacks one is of another version.
#define FACE_FUNCTIONS(X) \
  X(load)                 \
  X(loaded)               \
  X(status_name)          \
  X(device_count)         \
  X(device_reset)         \
  X(malloc)               \
  X(free)                 \
  X(malloc_host)          \
  X(free_host)            \
  X(copy)                 \
  X(create)               \
  X(initialize)           \
  X(finalize)             \
  X(destroy)              \
  X(set_role)             \
  X(link)                 \
  X(unlink)               \
  X(register)             \
  X(unregister)           \
  X(pull_cache)           \
  X(pull_blocks)          \
  X(push_cache)           \
  X(push_blocks)          \
  X(allocate_cache)       \
  X(deallocate_cache)     \
  X(copy_cache)           \
  X(copy_blocks)

struct face {
#define FACE_MEMBER(name) __typeof__(cann_##name) *cann_##name;
  FACE_FUNCTIONS(FACE_MEMBER)
#undef FACE_MEMBER
};

static struct face functions;      // written once, by shim_open
static const struct face *current; // NULL until functions is whole

static const struct face *opened(void) { return __atomic_load_n(&current, __ATOMIC_ACQUIRE); }

__attribute__((format(printf, 3, 4))) static int32_t refuse(cann_error *error, int64_t code, const char *form, ...) {
  error->code = code;
  va_list arguments;
  va_start(arguments, form);
  vsnprintf(error->text, sizeof error->text, form, arguments);
  va_end(arguments);
  return CANN_FACE;
}

static const char *reason(void) {
  const char *text = dlerror();
  return text != NULL ? text : "no reason was given";
}

static int32_t look_up(void *handle, const char *name, void *function, const char *path, cann_error *error) {
  void *address = dlsym(handle, name);
  if (address == NULL) return refuse(error, CANN_MISSING_SYMBOL, "%s has no %s: it is the face of another version", path, name);
  memcpy(function, &address, sizeof address); // a pointer to a function, which C lets nobody convert from another one
  return CANN_SUCCESS;
}

int32_t shim_open(const uint8_t *path, cann_error *error) {
  if (opened() != NULL) return CANN_SUCCESS;
  const char *text = (const char *)path;
  void *handle = dlopen(text, RTLD_NOW | RTLD_LOCAL);
  if (handle == NULL) return refuse(error, CANN_CANNOT_LOAD, "cannot load the face of the vendor's library: %s", reason());
#define FACE_FIND(name)                                                                      \
  if (look_up(handle, "cann_" #name, &functions.cann_##name, text, error) != CANN_SUCCESS) { \
    dlclose(handle);                                                                         \
    return CANN_FACE;                                                                        \
  }
  FACE_FUNCTIONS(FACE_FIND)
#undef FACE_FIND
  __atomic_store_n(&current, &functions, __ATOMIC_RELEASE);
  return CANN_SUCCESS;
}

int32_t shim_probe(const uint8_t *name, cann_error *error) {
  if (dlopen((const char *)name, RTLD_NOW | RTLD_LOCAL) != NULL) return CANN_SUCCESS;
  return refuse(error, CANN_CANNOT_LOAD, "%s", reason());
}

const char *shim_file(void) {
  Dl_info info;
  const void *here = &functions;
  return dladdr(here, &info) != 0 ? info.dli_fname : NULL;
}

const char *shim_environment(const uint8_t *name) { return getenv((const char *)name); }

// CALL calls a function of the face, where there is one.
#define CALL(name, ...)                                                                            \
  const struct face *face = opened();                                                              \
  if (face == NULL) return refuse(error, CANN_NOT_LOADED, "the vendor's library is not loaded yet"); \
  return face->cann_##name(__VA_ARGS__)

int32_t shim_load(const uint8_t *folder, cann_error *error) { CALL(load, (const char *)folder, error); }

int32_t shim_loaded(uint8_t *text, uint64_t bytes, cann_error *error) { CALL(loaded, (char *)text, bytes, error); }

int32_t shim_device_count(uint32_t *count, cann_error *error) { CALL(device_count, count, error); }

int32_t shim_malloc(int32_t device, uint64_t bytes, int32_t policy, uint64_t *address, cann_error *error) {
  CALL(malloc, device, bytes, policy, address, error);
}

int32_t shim_free(int32_t device, uint64_t address, cann_error *error) { CALL(free, device, address, error); }

int32_t shim_malloc_host(int32_t device, uint64_t bytes, uint64_t *address, cann_error *error) {
  CALL(malloc_host, device, bytes, address, error);
}

int32_t shim_free_host(int32_t device, uint64_t address, cann_error *error) { CALL(free_host, device, address, error); }

int32_t shim_copy(int32_t device, int32_t kind, const cann_copy_move *moves, uint64_t count, cann_error *error) {
  CALL(copy, device, kind, moves, count, error);
}

int32_t shim_create(uint64_t cluster_id, int32_t role, int32_t device, int64_t *object, cann_error *error) {
  CALL(create, cluster_id, role, device, object, error);
}

int32_t shim_initialize(int64_t object, const uint8_t *options, uint64_t option_bytes, cann_error *error) {
  CALL(initialize, object, (const char *)options, option_bytes, error);
}

int32_t shim_destroy(int64_t object, cann_error *error) { CALL(destroy, object, error); }

// The status of the one cluster is that of the whole call.
int32_t shim_link(int64_t object, const cann_cluster *cluster, int32_t timeout_ms, cann_error *error) {
  uint32_t status;
  CALL(link, object, cluster, 1, timeout_ms, &status, error);
}

int32_t shim_unlink(int64_t object, const cann_cluster *cluster, int32_t timeout_ms, cann_error *error) {
  uint32_t status;
  CALL(unlink, object, cluster, 1, timeout_ms, 1, &status, error);
}

int32_t shim_register(int64_t object, const cann_description *description, const uint64_t *addresses, uint64_t count, int64_t *cache_id,
                      cann_error *error) {
  CALL(register, object, description, addresses, count, cache_id, error);
}

int32_t shim_unregister(int64_t object, int64_t cache_id, cann_error *error) { CALL(unregister, object, cache_id, error); }

int32_t shim_pull_cache(int64_t object, const cann_transfer *transfer, cann_error *error) { CALL(pull_cache, object, transfer, error); }

int32_t shim_pull_blocks(int64_t object, const cann_transfer *transfer, const uint64_t *src_blocks, uint64_t src_count,
                         const uint64_t *dst_blocks, uint64_t dst_count, cann_error *error) {
  CALL(pull_blocks, object, transfer, src_blocks, src_count, dst_blocks, dst_count, error);
}
