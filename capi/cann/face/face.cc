// SPDX-License-Identifier: Apache-2.0
//
// The C functions of cann_face.h: numbers and packed arrays become the library's own types, and whatever is thrown becomes a cann_error.

#include "cann_face.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>

#include "library.h"
#include "object.h"

using namespace llm_datadist;
using cann::Library;
using cann::Members;
using cann::Refusal;

namespace {

int32_t report(cann_error *error, int32_t who, int64_t code, const char *text) noexcept {
  if (error != nullptr) {
    error->code = code;
    std::snprintf(error->text, sizeof error->text, "%s", text);
  }
  return who;
}

// guarded runs the whole of a C function.
template <typename Call>
int32_t guarded(cann_error *error, Call &&run) noexcept {
  try {
    run();
    return report(error, CANN_SUCCESS, 0, "");
  } catch (const Refusal &refusal) {
    return report(error, refusal.who, refusal.code, refusal.text.c_str());
  } catch (const std::bad_alloc &) {
    return report(error, CANN_FACE, CANN_NO_MEMORY, "out of host memory");
  } catch (const std::exception &exception) {
    return report(error, CANN_FACE, CANN_EXCEPTION, exception.what());
  } catch (...) {
    return report(error, CANN_FACE, CANN_EXCEPTION, "the library has thrown something that is no std::exception");
  }
}

void need(bool condition, const char *what) {
  if (!condition) throw Refusal{CANN_FACE, CANN_BAD_ARGUMENT, what};
}

void check(const char *what, uint32_t status) {
  if (status == 0) return;
  const char *name = cann_status_name(status);
  char text[128];
  std::snprintf(text, sizeof text, "%s: %s (0x%08X)", what, *name != 0 ? name : "a status that is not documented", status);
  throw Refusal{CANN_LIBRARY, status, text};
}

// on runs a native call of an object and checks its status.
template <typename Call>
int32_t on(int64_t object, const char *what, cann_error *error, Call &&run) noexcept {
  return guarded(error, [&] { check(what, cann::find(object)->call(run)); });
}

// runtime runs one call of the device runtime on a thread bound to a device.
template <typename Call>
void runtime(int32_t device, const char *what, Call &&run) {
  const Library &library = cann::loaded();
  cann::set_device(library, device);
  const int32_t code = run(library.runtime);
  if (code != 0) throw Refusal{CANN_RUNTIME, code, std::string(what) + ": the runtime's error " + std::to_string(code)};
}

void *pointer(uint64_t address) { return reinterpret_cast<void *>(address); }

// ---- from the face's types to the library's

// options reads pairs of texts, each ended by a zero byte.
Options options(const char *packed, uint64_t bytes) {
  need(bytes == 0 || (packed != nullptr && packed[bytes - 1] == 0), "options do not end with a zero byte");
  Options read;
  for (const char *key = packed, *end = packed + bytes; key != end;) {
    const char *value = key + std::strlen(key) + 1;
    need(value != end, "an option has a key and no value");
    read.insert_or_assign(key, value);
    key = value + std::strlen(value) + 1;
  }
  return read;
}

std::vector<uint64_t> numbers(const uint64_t *list, uint64_t count) {
  need(list != nullptr || count == 0, "a list of numbers is missing");
  return std::vector<uint64_t>(list, list + count);
}

template <size_t size>
std::vector<IpInfo> address(const char (&ip)[size], uint16_t port) {
  need(std::memchr(ip, 0, size) != nullptr, "an address does not end with a zero byte");
  if (*ip == 0) return {};
  return {IpInfo{ip, port, {}}};
}

std::vector<ClusterInfo> clusters(const cann_cluster *list, uint64_t count) {
  need(list != nullptr || count == 0, "a list of clusters is missing");
  std::vector<ClusterInfo> read;
  for (uint64_t i = 0; i < count; i++) {
    read.push_back({list[i].cluster_id, 0, address(list[i].local_ip, list[i].local_port),
                    address(list[i].remote_ip, list[i].remote_port), {}});
  }
  return read;
}

CacheDesc description(const cann_description *given) {
  need(given != nullptr, "the description is missing");
  need(given->rank <= std::size(given->shape), "the shape has too many dimensions");
  return {static_cast<CachePlacement>(given->placement), given->num_tensors, static_cast<ge::DataType>(given->data_type),
          std::vector<int64_t>(given->shape, given->shape + given->rank), {}};
}

Cache cache(int64_t id) {
  Cache named{};
  named.cache_id = id;
  return named;
}

// The three parts of a transfer, as the library takes them.
struct Transfer {
  CacheIndex remote;
  Cache local;
  KvCacheExtParam layers;

  explicit Transfer(const cann_transfer *given) : remote{}, local{}, layers{} {
    need(given != nullptr, "the transfer is missing");
    need(given->tensors_per_layer <= std::numeric_limits<uint8_t>::max(), "a layer has more tensors than the library can be told");
    remote = {given->cluster_id, given->remote_cache, given->remote_batch, {}};
    local = cache(given->local_cache);
    local.cache_desc.placement = static_cast<CachePlacement>(given->local_placement);
    local.cache_desc.num_tensors = given->local_tensors;
    layers.src_layer_range = {given->src_first_layer, given->src_last_layer};
    layers.dst_layer_range = {given->dst_first_layer, given->dst_last_layer};
    layers.tensor_num_per_layer = static_cast<uint8_t>(given->tensors_per_layer);
  }
};

// linking makes a call for many clusters and hands their statuses out.
template <typename Call>
int32_t linking(int64_t object, const char *what, const cann_cluster *list, uint64_t count, uint32_t *statuses, cann_error *error,
                Call &&run) {
  return on(object, what, error, [&](LlmDataDist &native, const Members &members) {
    need(statuses != nullptr || count == 0, "there is no room for the statuses");
    std::vector<Status> each;
    const Status status = run(native, members, clusters(list, count), each);
    each.resize(count, status);
    std::copy(each.begin(), each.end(), statuses);
    return status;
  });
}

}  // namespace

// ---- loading

int32_t cann_load(const char *folder, cann_error *error) {
  return guarded(error, [&] { cann::load(folder != nullptr ? folder : ""); });
}

int32_t cann_loaded(char *text, uint64_t bytes, cann_error *error) {
  return guarded(error, [&] {
    need(text != nullptr && bytes > 0, "there is no room for the paths");
    std::string lines;
    for (const std::string &path : cann::loaded().paths) lines += path + "\n";
    std::snprintf(text, bytes, "%s", lines.c_str());
  });
}

// ---- device runtime

int32_t cann_device_count(uint32_t *count, cann_error *error) {
  return guarded(error, [&] {
    need(count != nullptr, "there is no room for the count");
    const int32_t code = cann::loaded().runtime.aclrtGetDeviceCount(count);
    if (code != 0) throw Refusal{CANN_RUNTIME, code, "aclrtGetDeviceCount: the runtime's error " + std::to_string(code)};
  });
}

int32_t cann_device_reset(int32_t device, cann_error *error) {
  return guarded(error, [&] {
    runtime(device, "aclrtResetDevice", [&](const cann::Runtime &acl) { return acl.aclrtResetDevice(device); });
  });
}

int32_t cann_malloc(int32_t device, uint64_t bytes, int32_t policy, uint64_t *address, cann_error *error) {
  return guarded(error, [&] {
    need(address != nullptr, "there is no room for the address");
    void *made = nullptr;
    runtime(device, "aclrtMalloc", [&](const cann::Runtime &acl) { return acl.aclrtMalloc(&made, bytes, policy); });
    *address = reinterpret_cast<uint64_t>(made);
  });
}

int32_t cann_free(int32_t device, uint64_t address, cann_error *error) {
  return guarded(error, [&] {
    runtime(device, "aclrtFree", [&](const cann::Runtime &acl) { return acl.aclrtFree(pointer(address)); });
  });
}

int32_t cann_malloc_host(int32_t device, uint64_t bytes, uint64_t *address, cann_error *error) {
  return guarded(error, [&] {
    need(address != nullptr, "there is no room for the address");
    void *made = nullptr;
    runtime(device, "aclrtMallocHost", [&](const cann::Runtime &acl) { return acl.aclrtMallocHost(&made, bytes); });
    *address = reinterpret_cast<uint64_t>(made);
  });
}

int32_t cann_free_host(int32_t device, uint64_t address, cann_error *error) {
  return guarded(error, [&] {
    runtime(device, "aclrtFreeHost", [&](const cann::Runtime &acl) { return acl.aclrtFreeHost(pointer(address)); });
  });
}

int32_t cann_copy(int32_t device, int32_t kind, const cann_copy_move *moves, uint64_t count, cann_error *error) {
  return guarded(error, [&] {
    need(moves != nullptr || count == 0, "a list of moves is missing");
    runtime(device, "aclrtMemcpy", [&](const cann::Runtime &acl) {
      for (const cann_copy_move *move = moves; move != moves + count; move++) {
        const int32_t code = acl.aclrtMemcpy(pointer(move->dst), move->dst_bytes, pointer(move->src), move->bytes, kind);
        if (code != 0) return code;
      }
      return 0;
    });
  });
}

// ---- one LlmDataDist

int32_t cann_create(uint64_t cluster_id, int32_t role, int32_t device, int64_t *object, cann_error *error) {
  return guarded(error, [&] {
    need(object != nullptr, "there is no room for the object's number");
    *object = cann::keep(std::make_shared<cann::Object>(cann::loaded(), cluster_id, role, device));
  });
}

int32_t cann_initialize(int64_t object, const char *packed, uint64_t bytes, cann_error *error) {
  return on(object, "Initialize", error,
            [&](LlmDataDist &native, const Members &members) { return (native.*members.Initialize)(options(packed, bytes)); });
}

int32_t cann_finalize(int64_t object, cann_error *error) {
  return guarded(error, [&] { cann::find(object)->finalize(); });
}

int32_t cann_destroy(int64_t object, cann_error *error) {
  return guarded(error, [&] { cann::take(object)->finalize(); });  // the last call that is under way ends the object
}

int32_t cann_set_role(int64_t object, int32_t role, const char *packed, uint64_t bytes, cann_error *error) {
  return on(object, "SetRole", error, [&](LlmDataDist &native, const Members &members) {
    return (native.*members.SetRole)(static_cast<LlmRole>(role), options(packed, bytes));
  });
}

int32_t cann_link(int64_t object, const cann_cluster *list, uint64_t count, int32_t timeout_ms, uint32_t *statuses, cann_error *error) {
  return linking(object, "LinkLlmClusters", list, count, statuses, error,
                 [&](LlmDataDist &native, const Members &members, const std::vector<ClusterInfo> &peers, std::vector<Status> &each) {
                   return (native.*members.LinkLlmClusters)(peers, each, timeout_ms);
                 });
}

int32_t cann_unlink(int64_t object, const cann_cluster *list, uint64_t count, int32_t timeout_ms, int32_t force, uint32_t *statuses,
                    cann_error *error) {
  return linking(object, "UnlinkLlmClusters", list, count, statuses, error,
                 [&](LlmDataDist &native, const Members &members, const std::vector<ClusterInfo> &peers, std::vector<Status> &each) {
                   return (native.*members.UnlinkLlmClusters)(peers, each, timeout_ms, force != 0);
                 });
}

int32_t cann_register(int64_t object, const cann_description *given, const uint64_t *addresses, uint64_t count, int64_t *cache_id,
                      cann_error *error) {
  return on(object, "RegisterKvCache", error, [&](LlmDataDist &native, const Members &members) {
    need(cache_id != nullptr, "there is no room for the cache id");
    return (native.*members.RegisterKvCache)(description(given), numbers(addresses, count), RegisterCfg{}, *cache_id);
  });
}

int32_t cann_unregister(int64_t object, int64_t cache_id, cann_error *error) {
  return on(object, "UnregisterKvCache", error,
            [&](LlmDataDist &native, const Members &members) { return (native.*members.UnregisterKvCache)(cache_id); });
}

int32_t cann_pull_cache(int64_t object, const cann_transfer *given, cann_error *error) {
  return on(object, "PullKvCache", error, [&](LlmDataDist &native, const Members &members) {
    const Transfer transfer(given);
    return (native.*members.PullKvCache)(transfer.remote, transfer.local, given->local_batch, given->bytes, transfer.layers);
  });
}

int32_t cann_pull_blocks(int64_t object, const cann_transfer *given, const uint64_t *src_blocks, uint64_t src_count,
                         const uint64_t *dst_blocks, uint64_t dst_count, cann_error *error) {
  return on(object, "PullKvBlocks", error, [&](LlmDataDist &native, const Members &members) {
    const Transfer transfer(given);
    return (native.*members.PullKvBlocks)(transfer.remote, transfer.local, numbers(src_blocks, src_count), numbers(dst_blocks, dst_count),
                                          transfer.layers);
  });
}

int32_t cann_push_cache(int64_t object, const cann_transfer *given, cann_error *error) {
  return on(object, "PushKvCache", error, [&](LlmDataDist &native, const Members &members) {
    const Transfer transfer(given);
    return (native.*members.PushKvCache)(transfer.local, transfer.remote, given->local_batch, given->bytes, transfer.layers);
  });
}

int32_t cann_push_blocks(int64_t object, const cann_transfer *given, const uint64_t *src_blocks, uint64_t src_count,
                         const uint64_t *dst_blocks, uint64_t dst_count, cann_error *error) {
  return on(object, "PushKvBlocks", error, [&](LlmDataDist &native, const Members &members) {
    const Transfer transfer(given);
    return (native.*members.PushKvBlocks)(transfer.local, transfer.remote, numbers(src_blocks, src_count), numbers(dst_blocks, dst_count),
                                          transfer.layers);
  });
}

int32_t cann_allocate_cache(int64_t object, const cann_description *given, int64_t *cache_id, uint64_t *addresses, uint64_t room,
                            uint64_t *count, cann_error *error) {
  return on(object, "AllocateCache", error, [&](LlmDataDist &native, const Members &members) {
    need(cache_id != nullptr && count != nullptr && (addresses != nullptr || room == 0), "there is no room for the cache");
    Cache made{};
    const Status status = (native.*members.AllocateCache)(description(given), made);
    *cache_id = made.cache_id;
    *count = made.tensor_addrs.size();
    std::copy_n(made.tensor_addrs.begin(), std::min<uint64_t>(room, *count), addresses);
    return status;
  });
}

int32_t cann_deallocate_cache(int64_t object, int64_t cache_id, cann_error *error) {
  return on(object, "DeallocateCache", error,
            [&](LlmDataDist &native, const Members &members) { return (native.*members.DeallocateCache)(cache_id); });
}

int32_t cann_copy_cache(int64_t object, int64_t src_cache, int64_t dst_cache, uint32_t src_batch, uint32_t dst_batch, uint64_t offset,
                        int64_t bytes, cann_error *error) {
  return on(object, "CopyKvCache", error, [&](LlmDataDist &native, const Members &members) {
    return (native.*members.CopyKvCache)(cache(src_cache), cache(dst_cache), src_batch, dst_batch, offset, bytes);
  });
}

int32_t cann_copy_blocks(int64_t object, int64_t src_cache, int64_t dst_cache, const uint64_t *src_blocks, uint64_t src_count,
                         const uint64_t *dst_blocks, uint64_t dst_lists, cann_error *error) {
  return on(object, "CopyKvBlocks", error, [&](LlmDataDist &native, const Members &members) {
    need(dst_blocks != nullptr || src_count == 0 || dst_lists == 0, "a list of numbers is missing");
    std::vector<std::vector<uint64_t>> lists;
    for (uint64_t i = 0; i < dst_lists; i++) lists.push_back(numbers(dst_blocks + i * src_count, src_count));
    return (native.*members.CopyKvBlocks)(cache(src_cache), cache(dst_cache), numbers(src_blocks, src_count), lists);
  });
}
