// SPDX-License-Identifier: Apache-2.0
//
// The vendor's libraries as they were loaded: a pointer to each entry point that the face calls.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "vendor.h"

namespace cann {

// Refusal is thrown where a call ends without success, and becomes the cann_error of the call at the border.
struct Refusal {
  int32_t who;
  int64_t code;
  std::string text;
};

// Each member of LlmDataDist that is called, and its name in the library (Itanium C++ ABI, the same for both std::string ABIs).
#define CANN_MEMBERS(X)                                                                                                          \
  X(Initialize, "_ZN12llm_datadist11LlmDataDist10InitializeERKSt3mapIN2ge12AscendStringES3_St4lessIS3_ESaISt4pairIKS3_S3_EEE")   \
  X(Finalize, "_ZN12llm_datadist11LlmDataDist8FinalizeEv")                                                                       \
  X(SetRole,                                                                                                                     \
    "_ZN12llm_datadist11LlmDataDist7SetRoleENS_7LlmRoleERKSt3mapIN2ge12AscendStringES4_St4lessIS4_ESaISt4pairIKS4_S4_EEE")       \
  X(LinkLlmClusters, "_ZN12llm_datadist11LlmDataDist15LinkLlmClustersERKSt6vectorINS_11ClusterInfoESaIS2_EERS1_IjSaIjEEi")       \
  X(UnlinkLlmClusters, "_ZN12llm_datadist11LlmDataDist17UnlinkLlmClustersERKSt6vectorINS_11ClusterInfoESaIS2_EERS1_IjSaIjEEib")  \
  X(AllocateCache, "_ZN12llm_datadist11LlmDataDist13AllocateCacheERKNS_9CacheDescERNS_5CacheE")                                  \
  X(DeallocateCache, "_ZN12llm_datadist11LlmDataDist15DeallocateCacheEl")                                                        \
  X(PullKvCache, "_ZN12llm_datadist11LlmDataDist11PullKvCacheERKNS_10CacheIndexERKNS_5CacheEjlRKNS_15KvCacheExtParamE")          \
  X(PullKvBlocks,                                                                                                                \
    "_ZN12llm_datadist11LlmDataDist12PullKvBlocksERKNS_10CacheIndexERKNS_5CacheERKSt6vectorImSaImEESB_RKNS_15KvCacheExtParamE")  \
  X(CopyKvCache, "_ZN12llm_datadist11LlmDataDist11CopyKvCacheERKNS_5CacheES3_jjml")                                              \
  X(CopyKvBlocks, "_ZN12llm_datadist11LlmDataDist12CopyKvBlocksERKNS_5CacheES3_RKSt6vectorImSaImEERKS4_IS6_SaIS6_EE")            \
  X(PushKvCache, "_ZN12llm_datadist11LlmDataDist11PushKvCacheERKNS_5CacheERKNS_10CacheIndexEjlRKNS_15KvCacheExtParamE")          \
  X(PushKvBlocks,                                                                                                                \
    "_ZN12llm_datadist11LlmDataDist12PushKvBlocksERKNS_5CacheERKNS_10CacheIndexERKSt6vectorImSaImEESB_RKNS_15KvCacheExtParamE")  \
  X(RegisterKvCache,                                                                                                             \
    "_ZN12llm_datadist11LlmDataDist15RegisterKvCacheERKNS_9CacheDescERKSt6vectorImSaImEERKNS_11RegisterCfgERl")                  \
  X(UnregisterKvCache, "_ZN12llm_datadist11LlmDataDist17UnregisterKvCacheEl")

// The complete-object constructor and destructor are called as the plain functions that they are on 64-bit Linux.
constexpr const char *kConstructor = "_ZN12llm_datadist11LlmDataDistC1EmNS_7LlmRoleE";
constexpr const char *kDestructor = "_ZN12llm_datadist11LlmDataDistD1Ev";

struct Members {
  void (*construct)(llm_datadist::LlmDataDist *, uint64_t, llm_datadist::LlmRole);
  void (*destruct)(llm_datadist::LlmDataDist *);
#define CANN_MEMBER(name, mangled) decltype(&llm_datadist::LlmDataDist::name) name;
  CANN_MEMBERS(CANN_MEMBER)
#undef CANN_MEMBER
};

// The members of ge::AscendString, as plain functions with the object first.
struct Strings {
  void (*construct)(ge::AscendString *, const char *);
  const char *(*get)(const ge::AscendString *);
  size_t (*length)(const ge::AscendString *);
  bool (*less)(const ge::AscendString *, const ge::AscendString *);
};

// The device runtime. Every function returns an aclError, 0 for success.
#define CANN_RUNTIME_FUNCTIONS(X)                                 \
  X(aclInit, int32_t(const char *))                               \
  X(aclrtGetDeviceCount, int32_t(uint32_t *))                     \
  X(aclrtSetDevice, int32_t(int32_t))                             \
  X(aclrtResetDevice, int32_t(int32_t))                           \
  X(aclrtMalloc, int32_t(void **, size_t, int))                   \
  X(aclrtFree, int32_t(void *))                                   \
  X(aclrtMallocHost, int32_t(void **, size_t))                    \
  X(aclrtFreeHost, int32_t(void *))                               \
  X(aclrtMemcpy, int32_t(void *, size_t, const void *, size_t, int))

struct Runtime {
#define CANN_FUNCTION(name, type) std::add_pointer_t<type> name;
  CANN_RUNTIME_FUNCTIONS(CANN_FUNCTION)
#undef CANN_FUNCTION
};

struct Library {
  std::vector<std::string> paths;
  Members members;
  Strings strings;
  Runtime runtime;
};

// load loads the libraries as cann_load says. It throws a Refusal.
void load(const std::string &folder);

// loaded returns what load has loaded, or throws a Refusal.
const Library &loaded();

// refuse_changes throws a Refusal where bytes of room behind the first used ones are not what mark made of them: the library's objects
// of that class are larger than the face knows.
constexpr size_t kProbeRoom = 64;
void mark(unsigned char (&room)[kProbeRoom]);
void refuse_changes(const unsigned char (&room)[kProbeRoom], size_t used, const char *what);

}  // namespace cann
