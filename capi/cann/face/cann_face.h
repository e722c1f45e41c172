/* SPDX-License-Identifier: Apache-2.0
 *
 * A flat C face of the vendor's libllm_datadist.so (a C++ class) and of the device runtime beside it, for cgo and ctypes. The libraries
 * are loaded by cann_load and not before; libcann_face.so itself needs only the C and C++ runtimes.
 *
 * Every function returns CANN_SUCCESS, or says who refused: the face, the library or the runtime. The number that the library or the
 * runtime gave stands in the error as it came. `error` may be NULL. No C++ exception leaves the face.
 *
 * All functions may be called from any thread. Each one that takes an object or a device binds the calling thread to that device first,
 * and leaves it bound: the runtime keeps a device for each OS thread. Addresses of device memory are numbers, not pointers: the host must
 * not follow them.
 */
#ifndef CANN_FACE_H
#define CANN_FACE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* Who refused a call. */
enum {
    CANN_SUCCESS = 0,
    CANN_FACE = 1,    /* the face: the code of the error is one of CANN_NOT_LOADED ... */
    CANN_LIBRARY = 2, /* libllm_datadist.so: the code is its status */
    CANN_RUNTIME = 3  /* the device runtime: the code is its aclError */
};

/* Why the face refused a call. */
enum {
    CANN_NOT_LOADED = 1,     /* cann_load has not succeeded, or another folder was loaded */
    CANN_CANNOT_LOAD = 2,    /* a library is missing, or is not one for this machine */
    CANN_MISSING_SYMBOL = 3, /* a library is of another version: the text names the symbol */
    CANN_WRONG_ABI = 4,      /* a library's objects are not what the face was written for */
    CANN_UNKNOWN_OBJECT = 5,
    CANN_BAD_ARGUMENT = 6,
    CANN_NO_MEMORY = 7,
    CANN_EXCEPTION = 8 /* the library has thrown */
};

/* code is zero and text empty after a success. The text is cut to its room and always ended by a zero byte. */
typedef struct {
    int64_t code;
    char text[1016];
} cann_error;

/* ---- loading ---- */

/* cann_load loads libllm_datadist.so and the device runtime, looks every entry point up and initialises the runtime. Where folder is not
 * NULL or "", they are looked for in it alone; else by their names (LD_LIBRARY_PATH and the system's folders), then in lib64 of
 * $ASCEND_HOME_PATH and of $ASCEND_TOOLKIT_HOME. Loading twice is fine, also from several threads; two folders in one process are not.
 * After a failure another try is allowed. What was loaded stays so until the process ends. */
int32_t cann_load(const char *folder, cann_error *error);

/* cann_loaded writes the paths of the loaded libraries, a line each, into text of so many bytes, and cuts them there. */
int32_t cann_loaded(char *text, uint64_t bytes, cann_error *error);

/* cann_status_name returns the documented name of a status of the library, or "" for a number without one. */
const char *cann_status_name(uint32_t status);

/* ---- device runtime ---- */

enum { CANN_HOST_TO_HOST = 0, CANN_HOST_TO_DEVICE = 1, CANN_DEVICE_TO_HOST = 2, CANN_DEVICE_TO_DEVICE = 3 };
enum { CANN_HUGE_FIRST = 0, CANN_HUGE_ONLY = 1, CANN_NORMAL_ONLY = 2 };

typedef struct {
    uint64_t dst;
    uint64_t dst_bytes; /* room at dst; a copy of more fails */
    uint64_t src;
    uint64_t bytes;
} cann_copy_move;

int32_t cann_device_count(uint32_t *count, cann_error *error);
int32_t cann_device_reset(int32_t device, cann_error *error);
int32_t cann_malloc(int32_t device, uint64_t bytes, int32_t policy, uint64_t *address, cann_error *error);
int32_t cann_free(int32_t device, uint64_t address, cann_error *error);
/* cann_malloc_host obtains pinned host memory, which the host may touch. */
int32_t cann_malloc_host(int32_t device, uint64_t bytes, uint64_t *address, cann_error *error);
int32_t cann_free_host(int32_t device, uint64_t address, cann_error *error);
/* cann_copy makes copies of one kind, in order; the first failure ends it. They are done when it returns. */
int32_t cann_copy(int32_t device, int32_t kind, const cann_copy_move *moves, uint64_t count, cann_error *error);

/* ---- one LlmDataDist ---- */

enum { CANN_PROMPT = 1, CANN_DECODER = 2, CANN_MIX = 3 };
enum { CANN_ON_HOST = 0, CANN_ON_DEVICE = 1 };

/* Options are pairs of texts, each ended by a zero byte, a key before its value, in so many bytes: "llm.DeviceId\0" "0\0" ... */

/* cann_create makes an object whose calls run on a device. Objects are numbers that no descriptor or small integer equals. */
int32_t cann_create(uint64_t cluster_id, int32_t role, int32_t device, int64_t *object, cann_error *error);
int32_t cann_initialize(int64_t object, const char *options, uint64_t option_bytes, cann_error *error);
/* cann_finalize waits until the calls that are under way have returned, and keeps others waiting until it has returned itself. */
int32_t cann_finalize(int64_t object, cann_error *error);
/* cann_destroy forgets the object at once, waits as cann_finalize does, and ends it. */
int32_t cann_destroy(int64_t object, cann_error *error);
int32_t cann_set_role(int64_t object, int32_t role, const char *options, uint64_t option_bytes, cann_error *error);

/* A peer. An empty address is none. */
typedef struct {
    uint64_t cluster_id;
    char local_ip[46];
    char remote_ip[46];
    uint16_t local_port;
    uint16_t remote_port;
} cann_cluster;

/* statuses has room for count: each cluster's own status, or the whole call's where the library gave none for the cluster. */
int32_t cann_link(int64_t object, const cann_cluster *clusters, uint64_t count, int32_t timeout_ms, uint32_t *statuses,
                  cann_error *error);
int32_t cann_unlink(int64_t object, const cann_cluster *clusters, uint64_t count, int32_t timeout_ms, int32_t force, uint32_t *statuses,
                    cann_error *error);

typedef struct {
    uint32_t placement; /* CANN_ON_HOST, CANN_ON_DEVICE */
    uint32_t num_tensors;
    int32_t data_type; /* a number of the documented enumeration */
    uint32_t rank;
    int64_t shape[32];
} cann_description;

int32_t cann_register(int64_t object, const cann_description *description, const uint64_t *addresses, uint64_t count, int64_t *cache_id,
                      cann_error *error);
int32_t cann_unregister(int64_t object, int64_t cache_id, cann_error *error);

/* Both ends of a layer range belong to it; -1, -1 is all layers. */
typedef struct {
    uint64_t cluster_id; /* of the peer */
    int64_t remote_cache;
    int64_t local_cache;
    uint32_t remote_batch;
    uint32_t local_batch;
    int64_t bytes; /* of a row; -1: the local row. Not for blocks */
    int32_t src_first_layer, src_last_layer;
    int32_t dst_first_layer, dst_last_layer;
    uint32_t tensors_per_layer;
    uint32_t local_placement; /* what a push must know of its source: where it is, and */
    uint32_t local_tensors;   /* how many tensors it has */
    uint32_t zero;            /* padding */
} cann_transfer;

int32_t cann_pull_cache(int64_t object, const cann_transfer *transfer, cann_error *error);
int32_t cann_pull_blocks(int64_t object, const cann_transfer *transfer, const uint64_t *src_blocks, uint64_t src_count,
                         const uint64_t *dst_blocks, uint64_t dst_count, cann_error *error);
int32_t cann_push_cache(int64_t object, const cann_transfer *transfer, cann_error *error);
int32_t cann_push_blocks(int64_t object, const cann_transfer *transfer, const uint64_t *src_blocks, uint64_t src_count,
                         const uint64_t *dst_blocks, uint64_t dst_count, cann_error *error);

/* The remaining calls exist in every version of the library; this one answers LLM_FEATURE_NOT_ENABLED to all of them. */

/* cann_allocate_cache writes the number of addresses and at most room of them. */
int32_t cann_allocate_cache(int64_t object, const cann_description *description, int64_t *cache_id, uint64_t *addresses, uint64_t room,
                            uint64_t *count, cann_error *error);
int32_t cann_deallocate_cache(int64_t object, int64_t cache_id, cann_error *error);
int32_t cann_copy_cache(int64_t object, int64_t src_cache, int64_t dst_cache, uint32_t src_batch, uint32_t dst_batch, uint64_t offset,
                        int64_t bytes, cann_error *error);
/* cann_copy_blocks takes one list of source blocks and so many equally long lists of destination blocks, one after the other. */
int32_t cann_copy_blocks(int64_t object, int64_t src_cache, int64_t dst_cache, const uint64_t *src_blocks, uint64_t src_count,
                         const uint64_t *dst_blocks, uint64_t dst_lists, cann_error *error);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#endif
