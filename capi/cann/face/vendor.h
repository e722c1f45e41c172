// SPDX-License-Identifier: Apache-2.0
//
// What crosses the border to the vendor's libllm_datadist.so (hixl 9.2 and its kin), declared here so that no header of the vendor's is
// needed: structs, enums, and the members of two exported classes. Nothing here may be changed for beauty: names and parameters make the
// mangled names, members and their order make the layout, and the static asserts at the end hold the latter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ge {

using Status = uint32_t;

enum DataType : int32_t { DT_UNDEFINED = 28 };  // every other value passes through as a number

// AscendString is the vendor's string. What it holds depends on the std::string ABI of the library that made it, so it is never looked
// into here: the members below are this library's own, hidden, and hand over to those of libmetadef.so. The standard containers call
// them; copies and ends are the implicit ones, which touch only the reference count.
class AscendString {
 public:
  AscendString(const char *text);
  const char *GetString() const;
  size_t GetLength() const;
  bool operator<(const AscendString &other) const;

 private:
  std::shared_ptr<std::string> name_;
};

}  // namespace ge

namespace llm_datadist {

using Status = ge::Status;
using AscendString = ge::AscendString;
using Options = std::map<AscendString, AscendString>;

enum class LlmRole : int32_t { kPrompt = 1, kDecoder = 2, kMix = 3, kEnd };
enum class CachePlacement : uint32_t { kHost = 0, kDevice = 1 };

struct IpInfo {
  AscendString ip;
  uint16_t port = 0;
  uint8_t reserved[128];
};

struct ClusterInfo {
  uint64_t remote_cluster_id = 0;
  int32_t remote_role_type = 0;
  std::vector<IpInfo> local_ip_infos;
  std::vector<IpInfo> remote_ip_infos;
  uint8_t reserved[128];
};

struct CacheIndex {
  uint64_t cluster_id;
  int64_t cache_id;
  uint32_t batch_index;
  uint8_t reserved[128];
};

struct CacheDesc {
  CachePlacement placement = CachePlacement::kDevice;
  uint32_t num_tensors = 0;
  ge::DataType data_type = ge::DT_UNDEFINED;
  std::vector<int64_t> shape;
  uint8_t reserved[128];
};

struct Cache {
  int64_t cache_id = -1;
  std::vector<uintptr_t> tensor_addrs;
  CacheDesc cache_desc;
  uint8_t reserved[128];
};

// Both ends of a layer range belong to it; {-1, -1} is all layers.
struct KvCacheExtParam {
  std::pair<int32_t, int32_t> src_layer_range{-1, -1};
  std::pair<int32_t, int32_t> dst_layer_range{-1, -1};
  uint8_t tensor_num_per_layer = 2;
  uint8_t reserved[127];
};

struct RegisterCfg {
  uint8_t reserved[128] = {0};
};

// LlmDataDist has no definition here: its members are called through pointers that Library finds by their mangled names.
class LlmDataDist {
 public:
  Status Initialize(const Options &options);
  void Finalize();
  Status SetRole(LlmRole role, const Options &options);
  Status LinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets, int32_t timeout_in_millis);
  Status UnlinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets, int32_t timeout_in_millis,
                           bool force_flag);
  Status AllocateCache(const CacheDesc &desc, Cache &cache);
  Status DeallocateCache(int64_t cache_id);
  Status PullKvCache(const CacheIndex &src, const Cache &dst, uint32_t batch_index, int64_t size, const KvCacheExtParam &ext);
  Status PullKvBlocks(const CacheIndex &src, const Cache &dst, const std::vector<uint64_t> &src_blocks,
                      const std::vector<uint64_t> &dst_blocks, const KvCacheExtParam &ext);
  Status CopyKvCache(const Cache &src, const Cache &dst, uint32_t src_batch, uint32_t dst_batch, uint64_t offset, int64_t size);
  Status CopyKvBlocks(const Cache &src, const Cache &dst, const std::vector<uint64_t> &src_blocks,
                      const std::vector<std::vector<uint64_t>> &dst_blocks_list);
  Status PushKvCache(const Cache &src, const CacheIndex &dst, uint32_t src_batch_index, int64_t size, const KvCacheExtParam &ext);
  Status PushKvBlocks(const Cache &src, const CacheIndex &dst, const std::vector<uint64_t> &src_blocks,
                      const std::vector<uint64_t> &dst_blocks, const KvCacheExtParam &ext);
  Status RegisterKvCache(const CacheDesc &desc, const std::vector<uint64_t> &addrs, const RegisterCfg &cfg, int64_t &cache_id);
  Status UnregisterKvCache(int64_t cache_id);

 private:
  void *hidden_;
};

static_assert(sizeof(void *) == 8, "the layout is known for 64-bit Linux only");

#define LLM_DATADIST_AT(type, member, offset) static_assert(offsetof(type, member) == (offset), #type "::" #member " is elsewhere")
#define LLM_DATADIST_SIZE(type, bytes) static_assert(sizeof(type) == (bytes), #type " has another size")

LLM_DATADIST_SIZE(AscendString, 16);
LLM_DATADIST_SIZE(LlmDataDist, 8);

LLM_DATADIST_SIZE(IpInfo, 152);
LLM_DATADIST_AT(IpInfo, ip, 0);
LLM_DATADIST_AT(IpInfo, port, 16);
LLM_DATADIST_AT(IpInfo, reserved, 18);

LLM_DATADIST_SIZE(ClusterInfo, 192);
LLM_DATADIST_AT(ClusterInfo, remote_cluster_id, 0);
LLM_DATADIST_AT(ClusterInfo, remote_role_type, 8);
LLM_DATADIST_AT(ClusterInfo, local_ip_infos, 16);
LLM_DATADIST_AT(ClusterInfo, remote_ip_infos, 40);
LLM_DATADIST_AT(ClusterInfo, reserved, 64);

LLM_DATADIST_SIZE(CacheIndex, 152);
LLM_DATADIST_AT(CacheIndex, cluster_id, 0);
LLM_DATADIST_AT(CacheIndex, cache_id, 8);
LLM_DATADIST_AT(CacheIndex, batch_index, 16);
LLM_DATADIST_AT(CacheIndex, reserved, 20);

LLM_DATADIST_SIZE(CacheDesc, 168);
LLM_DATADIST_AT(CacheDesc, placement, 0);
LLM_DATADIST_AT(CacheDesc, num_tensors, 4);
LLM_DATADIST_AT(CacheDesc, data_type, 8);
LLM_DATADIST_AT(CacheDesc, shape, 16);
LLM_DATADIST_AT(CacheDesc, reserved, 40);

LLM_DATADIST_SIZE(Cache, 328);
LLM_DATADIST_AT(Cache, cache_id, 0);
LLM_DATADIST_AT(Cache, tensor_addrs, 8);
LLM_DATADIST_AT(Cache, cache_desc, 32);
LLM_DATADIST_AT(Cache, reserved, 200);

LLM_DATADIST_SIZE(KvCacheExtParam, 144);
LLM_DATADIST_AT(KvCacheExtParam, src_layer_range, 0);
LLM_DATADIST_AT(KvCacheExtParam, dst_layer_range, 8);
LLM_DATADIST_AT(KvCacheExtParam, tensor_num_per_layer, 16);
LLM_DATADIST_AT(KvCacheExtParam, reserved, 17);

LLM_DATADIST_SIZE(RegisterCfg, 128);
LLM_DATADIST_AT(RegisterCfg, reserved, 0);

#undef LLM_DATADIST_AT
#undef LLM_DATADIST_SIZE

}  // namespace llm_datadist
