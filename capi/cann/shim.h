/* SPDX-License-Identifier: Apache-2.0
 *
 * What Go calls of the face (face/cann_face.h), which is loaded when shim_open asks for it and not before: it brings the C++ runtime into
 * the process. Texts that come from Go are bytes ended by a zero byte.
 */
#ifndef CANN_SHIM_H
#define CANN_SHIM_H

#include "face/cann_face.h"

/* All of this is linked into one shared object, which shows none of it. */
#pragma GCC visibility push(hidden)

/* shim_open loads the face from a path and looks up every function of its header. Where it is open already nothing happens. One caller
 * at a time. */
int32_t shim_open(const uint8_t *path, cann_error *error);

/* shim_probe loads a library by its name, as the loader finds it, and keeps it: what follows would load it anyway. */
int32_t shim_probe(const uint8_t *name, cann_error *error);

/* shim_file is the path of the shared object, or the program, that contains this shim; NULL where the loader doesn't know. */
const char *shim_file(void);

/* shim_environment is getenv: Go's own copy of the environment was made when its runtime started, and the face looks at C's. */
const char *shim_environment(const uint8_t *name);

/* The functions of the face by their own names. Before shim_open has succeeded each is CANN_NOT_LOADED. */
int32_t shim_load(const uint8_t *folder, cann_error *error);
int32_t shim_loaded(uint8_t *text, uint64_t bytes, cann_error *error);
int32_t shim_device_count(uint32_t *count, cann_error *error);
int32_t shim_malloc(int32_t device, uint64_t bytes, int32_t policy, uint64_t *address, cann_error *error);
int32_t shim_free(int32_t device, uint64_t address, cann_error *error);
int32_t shim_malloc_host(int32_t device, uint64_t bytes, uint64_t *address, cann_error *error);
int32_t shim_free_host(int32_t device, uint64_t address, cann_error *error);
int32_t shim_copy(int32_t device, int32_t kind, const cann_copy_move *moves, uint64_t count, cann_error *error);
int32_t shim_create(uint64_t cluster_id, int32_t role, int32_t device, int64_t *object, cann_error *error);
int32_t shim_initialize(int64_t object, const uint8_t *options, uint64_t option_bytes, cann_error *error);
int32_t shim_destroy(int64_t object, cann_error *error);
int32_t shim_link(int64_t object, const cann_cluster *cluster, int32_t timeout_ms, cann_error *error);
int32_t shim_unlink(int64_t object, const cann_cluster *cluster, int32_t timeout_ms, cann_error *error);
int32_t shim_register(int64_t object, const cann_description *description, const uint64_t *addresses, uint64_t count, int64_t *cache_id,
                      cann_error *error);
int32_t shim_unregister(int64_t object, int64_t cache_id, cann_error *error);
int32_t shim_pull_cache(int64_t object, const cann_transfer *transfer, cann_error *error);
int32_t shim_pull_blocks(int64_t object, const cann_transfer *transfer, const uint64_t *src_blocks, uint64_t src_count,
                         const uint64_t *dst_blocks, uint64_t dst_count, cann_error *error);

#pragma GCC visibility pop

#endif
