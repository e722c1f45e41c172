// SPDX-License-Identifier: Apache-2.0
//
// Prints what a header says of the documented types, a line each: compiled once with the face's own declarations and once with another
// header of the library, the two have to print the same. HEADER is the header's name in quotes. Nothing of the library is linked.
#include HEADER

#include <cstddef>
#include <cstdio>
#include <typeinfo>

using namespace llm_datadist;

#define SIZE(type) std::printf("sizeof " #type " %zu\n", sizeof(type));
#define AT(type, member) std::printf(#type "::" #member " at %zu, %s\n", offsetof(type, member), typeid(decltype(type::member)).name());
#define VALUE(name) std::printf(#name " %lld\n", static_cast<long long>(name));
#define CALL(call) std::printf("LlmDataDist::" #call " %s\n", typeid(decltype(&LlmDataDist::call)).name());

int main() {
  SIZE(ge::AscendString)
  SIZE(ge::DataType)
  SIZE(LlmDataDist)
  VALUE(LlmRole::kPrompt)
  VALUE(LlmRole::kDecoder)
  VALUE(LlmRole::kMix)
  VALUE(CachePlacement::kHost)
  VALUE(CachePlacement::kDevice)
  VALUE(ge::DT_UNDEFINED)
  SIZE(IpInfo)
  AT(IpInfo, ip)
  AT(IpInfo, port)
  AT(IpInfo, reserved)
  SIZE(ClusterInfo)
  AT(ClusterInfo, remote_cluster_id)
  AT(ClusterInfo, remote_role_type)
  AT(ClusterInfo, local_ip_infos)
  AT(ClusterInfo, remote_ip_infos)
  AT(ClusterInfo, reserved)
  SIZE(CacheIndex)
  AT(CacheIndex, cluster_id)
  AT(CacheIndex, cache_id)
  AT(CacheIndex, batch_index)
  AT(CacheIndex, reserved)
  SIZE(CacheDesc)
  AT(CacheDesc, placement)
  AT(CacheDesc, num_tensors)
  AT(CacheDesc, data_type)
  AT(CacheDesc, shape)
  AT(CacheDesc, reserved)
  SIZE(Cache)
  AT(Cache, cache_id)
  AT(Cache, tensor_addrs)
  AT(Cache, cache_desc)
  AT(Cache, reserved)
  SIZE(KvCacheExtParam)
  AT(KvCacheExtParam, src_layer_range)
  AT(KvCacheExtParam, dst_layer_range)
  AT(KvCacheExtParam, tensor_num_per_layer)
  AT(KvCacheExtParam, reserved)
  SIZE(RegisterCfg)
  AT(RegisterCfg, reserved)
  CALL(Initialize)
  CALL(Finalize)
  CALL(SetRole)
  CALL(LinkLlmClusters)
  CALL(UnlinkLlmClusters)
  CALL(AllocateCache)
  CALL(DeallocateCache)
  CALL(PullKvCache)
  CALL(PullKvBlocks)
  CALL(CopyKvCache)
  CALL(CopyKvBlocks)
  CALL(PushKvCache)
  CALL(PushKvBlocks)
  CALL(RegisterKvCache)
  CALL(UnregisterKvCache)
}
