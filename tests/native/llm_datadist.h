// SPDX-License-Identifier: Apache-2.0
//
// The documented class and its types, as libllm_datadist.so of the stand-in takes them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "ascend_string.h"

namespace ge {

using Status = uint32_t;

enum DataType {
  DT_FLOAT = 0,
  DT_FLOAT16 = 1,
  DT_INT8 = 2,
  DT_INT32 = 3,
  DT_UINT8 = 4,
  DT_INT16 = 6,
  DT_UINT16 = 7,
  DT_UINT32 = 8,
  DT_INT64 = 9,
  DT_UINT64 = 10,
  DT_DOUBLE = 11,
  DT_BOOL = 12,
  DT_COMPLEX64 = 16,
  DT_COMPLEX128 = 17,
  DT_BF16 = 27,
  DT_UNDEFINED = 28,
  DT_COMPLEX32 = 33,
  DT_HIFLOAT8 = 34,
  DT_FLOAT8_E5M2 = 35,
  DT_FLOAT8_E4M3FN = 36
};

}  // namespace ge

namespace llm_datadist {

using ge::AscendString;
using ge::DataType;
using ge::Status;

constexpr Status LLM_SUCCESS = 0x0;
constexpr Status LLM_FAILED = 0xFFFFFFFF;
constexpr Status LLM_KV_CACHE_NOT_EXIST = 0x5010B002;
constexpr Status LLM_PARAM_INVALID = 0x5010B005;
constexpr Status LLM_NOT_YET_LINK = 0x5010B007;
constexpr Status LLM_ALREADY_LINK = 0x5010B008;
constexpr Status LLM_LINK_FAILED = 0x5010B009;
constexpr Status LLM_UNLINK_FAILED = 0x5010B00A;
constexpr Status LLM_EXIST_LINK = 0x5010B018;
constexpr Status LLM_FEATURE_NOT_ENABLED = 0x5010B019;
constexpr Status LLM_TIMEOUT = 0x5010B01A;

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
  DataType data_type = ge::DT_UNDEFINED;
  std::vector<int64_t> shape;
  uint8_t reserved[128];
};

struct Cache {
  int64_t cache_id = -1;
  std::vector<uintptr_t> tensor_addrs;
  CacheDesc cache_desc;
  uint8_t reserved[128];
};

struct KvCacheExtParam {
  std::pair<int32_t, int32_t> src_layer_range{-1, -1};
  std::pair<int32_t, int32_t> dst_layer_range{-1, -1};
  uint8_t tensor_num_per_layer = 2;
  uint8_t reserved[127];
};

struct RegisterCfg {
  uint8_t reserved[128] = {0};
};

class __attribute__((visibility("default"))) LlmDataDist {
 public:
  LlmDataDist(uint64_t cluster_id, LlmRole role);
  ~LlmDataDist();
  Status Initialize(const std::map<AscendString, AscendString> &options);
  void Finalize();
  Status SetRole(LlmRole role, const std::map<AscendString, AscendString> &options = {});
  Status LinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets, int32_t timeout_in_millis = 1000);
  Status UnlinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets, int32_t timeout_in_millis = 1000,
                           bool force_flag = false);
  Status AllocateCache(const CacheDesc &desc, Cache &cache);
  Status DeallocateCache(int64_t cache_id);
  Status PullKvCache(const CacheIndex &src, const Cache &dst, uint32_t batch_index = 0, int64_t size = -1,
                     const KvCacheExtParam &ext = {});
  Status PullKvBlocks(const CacheIndex &src, const Cache &dst, const std::vector<uint64_t> &src_blocks,
                      const std::vector<uint64_t> &dst_blocks, const KvCacheExtParam &ext = {});
  Status CopyKvCache(const Cache &src, const Cache &dst, uint32_t src_batch = 0, uint32_t dst_batch = 0, uint64_t offset = 0,
                     int64_t size = -1);
  Status CopyKvBlocks(const Cache &src, const Cache &dst, const std::vector<uint64_t> &src_blocks,
                      const std::vector<std::vector<uint64_t>> &dst_blocks_list);
  Status PushKvCache(const Cache &src, const CacheIndex &dst, uint32_t src_batch_index = 0, int64_t size = -1,
                     const KvCacheExtParam &ext = {});
  Status PushKvBlocks(const Cache &src, const CacheIndex &dst, const std::vector<uint64_t> &src_blocks,
                      const std::vector<uint64_t> &dst_blocks, const KvCacheExtParam &ext = {});
  Status RegisterKvCache(const CacheDesc &desc, const std::vector<uint64_t> &addrs, const RegisterCfg &cfg, int64_t &cache_id);
  Status UnregisterKvCache(int64_t cache_id);

 private:
  class Engine;
  std::unique_ptr<Engine> engine_;
};

}  // namespace llm_datadist
