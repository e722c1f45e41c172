// SPDX-License-Identifier: Apache-2.0
//
// The documented class over host memory and sockets, strict about every documented rule, with the default backend only.

#include "llm_datadist.h"

#include <arpa/inet.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstring>
#include <thread>

#include "caches.h"
#include "link.h"
#include "socket.h"
#include "standin.h"
#include "transfers.h"

extern "C" {
int32_t aclInit(const char *);
int32_t aclrtSetDevice(int32_t);
int32_t aclrtResetDevice(int32_t);
}

namespace llm_datadist {
namespace {

using standin::Deadline;
using standin::Entry;
using standin::Failure;
using standin::in_millis;
using standin::Link;
using standin::require;
using standin::Socket;

using Options = std::map<AscendString, AscendString>;

constexpr int64_t kDefaultSyncMillis = 1000;
constexpr size_t kLinkThreads = 16;
constexpr int64_t kHelloMillis = 1000;  // how long the listener waits for what a connection is for

std::string option(const Options &options, const char *key) {
  const auto found = options.find(key);
  return found != options.end() ? found->second.GetString() : "";
}

// digits reads a number that fits 32 bits.
uint64_t digits(const std::string &text) {
  require(!text.empty() && text.size() <= 10 && std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); }));
  const uint64_t number = std::stoull(text);
  require(number <= UINT32_MAX);
  return number;
}

bool is_ip(int family, const std::string &text) {
  unsigned char address[sizeof(in6_addr)];
  return inet_pton(family, text.c_str(), address) == 1;
}

struct Address {
  std::string ip;
  uint64_t port = 0;
};

// listen_address reads "ip:port" or "[ip]:port".
Address listen_address(const std::string &text) {
  const size_t colon = text.rfind(':');
  require(colon != std::string::npos && colon > 0);
  std::string ip = text.substr(0, colon);
  const bool bracketed = ip.size() > 2 && ip.front() == '[' && ip.back() == ']';
  if (bracketed) ip = ip.substr(1, ip.size() - 2);
  require(is_ip(bracketed ? AF_INET6 : AF_INET, ip));
  return {ip, digits(text.substr(colon + 1))};
}

// The class always answers with one of these at initialisation; what the runtime says becomes LLM_FAILED.
Status filtered(Status status) { return status == LLM_PARAM_INVALID ? status : LLM_FAILED; }

enum class Purpose : uint64_t { kAsk, kAnswer, kUnlink };

// The first words on a connection: what it is for, as the end that dials sees it.
struct Hello {
  uint64_t magic = 0x6e692d646e617473;
  Purpose purpose = Purpose::kAsk;
  uint64_t cluster_id = 0;
  uint64_t force = 0;  // a link of the dialing end that is still there is stale
};

struct Welcome {
  uint64_t status;
  uint64_t cluster_id;
};

}  // namespace

class LlmDataDist::Engine {
 public:
  Engine(uint64_t cluster_id, LlmRole role) : id_(cluster_id), role_(role) {}
  ~Engine() { finalize(); }

  Status initialize(const Options &options);
  void finalize();
  Status set_role(LlmRole role, const Options &options);
  Status link(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets, int32_t timeout_ms);
  Status unlink(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets, int32_t timeout_ms, bool force);
  Status pull_row(const CacheIndex &src, const Cache &dst, uint32_t row, int64_t size, const KvCacheExtParam &ext);
  Status pull_blocks(const CacheIndex &src, const Cache &dst, const standin::Blocks &src_blocks, const standin::Blocks &dst_blocks,
                     const KvCacheExtParam &ext);
  Status push_row(const Cache &src, const CacheIndex &dst, uint32_t row, int64_t size, const KvCacheExtParam &ext);
  Status push_blocks(const Cache &src, const CacheIndex &dst, const standin::Blocks &src_blocks, const standin::Blocks &dst_blocks,
                     const KvCacheExtParam &ext);

  // check_ready throws where the object is not initialised or the calling thread is not bound to its device.
  void check_ready() const {
    if (!initialized_ || standin_thread_device() != device_) throw Failure{LLM_FAILED};
  }

  standin::Caches caches;

 private:
  using PushLayer = std::function<std::vector<standin::Piece>(const standin::Layers &, const Entry &, const Entry &)>;

  void configure(const Options &options);
  void listen(const Address &address);
  void stop_listening();
  void accept();
  void welcome(Socket socket);
  Status welcome_link(const Hello &hello);
  std::shared_ptr<Link> find(uint64_t cluster_id);
  void forget(uint64_t cluster_id);
  Status link_one(const ClusterInfo &cluster, Deadline deadline);
  Status unlink_one(const ClusterInfo &cluster, Deadline deadline, bool force);
  std::shared_ptr<Link> linked(uint64_t cluster_id);
  Status push(const Cache &src, const CacheIndex &dst, const KvCacheExtParam &ext, const PushLayer &plan);

  const uint64_t id_;
  LlmRole role_;
  bool initialized_ = false;
  int32_t device_ = -1;
  int64_t sync_ms_ = kDefaultSyncMillis;
  std::string communication_;  // llm.LocalCommRes
  bool generated_ = false;     // the same made from the listen address

  Socket listener_;
  uint64_t port_ = 0;
  std::thread acceptor_;
  std::atomic<bool> stopping_{false};

  std::mutex guard_;  // guards links_
  std::map<uint64_t, std::shared_ptr<Link>> links_;
  std::mutex pushing_;  // one push at a time
};

Status LlmDataDist::Engine::initialize(const Options &options) {
  if (initialized_) return LLM_SUCCESS;
  require(role_ == LlmRole::kPrompt || role_ == LlmRole::kDecoder || role_ == LlmRole::kMix);
  try {
    configure(options);
  } catch (const Failure &failure) {
    return filtered(failure.status);
  }
  initialized_ = true;
  return LLM_SUCCESS;
}

void LlmDataDist::Engine::configure(const Options &options) {
  const std::string devices = option(options, "llm.DeviceId");
  if (devices.find(';') != std::string::npos) throw Failure{LLM_FAILED};
  const uint64_t device = digits(devices);
  const std::string sync = option(options, "llm.SyncKvCacheWaitTime");
  if (!sync.empty()) sync_ms_ = static_cast<int64_t>(digits(sync));
  const std::string listens = option(options, "llm.ListenIpInfo");
  const Address address = listens.empty() ? Address{} : listen_address(listens);
  const std::string backend = option(options, "llm.TransferBackend");
  require(backend.empty() || (backend == "hixl" && !listens.empty()));
  if (!backend.empty()) throw Failure{LLM_FAILED};  // not in the stand-in
  communication_ = option(options, "llm.LocalCommRes");
  aclInit(nullptr);
  if (aclrtSetDevice(static_cast<int32_t>(device)) != 0) throw Failure{LLM_FAILED};
  device_ = static_cast<int32_t>(device);
  if (!listens.empty()) listen(address);
  generated_ = !listens.empty() && communication_.empty();
}

void LlmDataDist::Engine::finalize() {
  stop_listening();
  std::map<uint64_t, std::shared_ptr<Link>> links;
  {
    std::lock_guard<std::mutex> lock(guard_);
    links.swap(links_);
  }
  for (const auto &link : links) link.second->end();
  if (initialized_) aclrtResetDevice(device_);
  initialized_ = false;
}

Status LlmDataDist::Engine::set_role(LlmRole role, const Options &options) {
  check_ready();
  require(role == LlmRole::kPrompt || role == LlmRole::kDecoder || role == LlmRole::kMix);
  const std::string listens = option(options, "llm.ListenIpInfo");
  const Address address = listens.empty() ? Address{} : listen_address(listens);
  {
    std::lock_guard<std::mutex> lock(guard_);
    if (std::any_of(links_.begin(), links_.end(), [](const auto &link) { return link.second->live(); })) return LLM_EXIST_LINK;
  }
  if (listens.empty()) {
    stop_listening();
  } else if (!listener_.open() || address.port != port_) {
    stop_listening();
    listen(address);
  }
  role_ = role;
  return LLM_SUCCESS;
}

// ---- listening

void LlmDataDist::Engine::listen(const Address &address) {
  if (address.port > UINT16_MAX) throw Failure{LLM_FAILED};
  try {
    listener_ = Socket::listen(address.ip, static_cast<uint16_t>(address.port));
  } catch (const standin::Broken &) {
    throw Failure{LLM_FAILED};
  }
  port_ = address.port;
  stopping_ = false;
  acceptor_ = std::thread([this] { accept(); });
}

void LlmDataDist::Engine::stop_listening() {
  if (!acceptor_.joinable()) return;
  stopping_ = true;
  listener_.shut();
  acceptor_.join();
  listener_ = Socket();
}

void LlmDataDist::Engine::accept() {
  while (!stopping_) {
    try {
      welcome(listener_.accept());
    } catch (const standin::Broken &) {  // a stranger, or a peer that is gone: its loss
    } catch (const standin::TimedOut &) {
    }
  }
}

void LlmDataDist::Engine::welcome(Socket socket) {
  const Deadline deadline = in_millis(kHelloMillis);
  const auto hello = socket.read<Hello>(deadline);
  if (hello.magic != Hello{}.magic) return;
  if (hello.purpose == Purpose::kUnlink) forget(hello.cluster_id);
  const Status status = hello.purpose == Purpose::kAsk ? welcome_link(hello) : LLM_SUCCESS;
  const std::shared_ptr<Link> link = find(hello.cluster_id);
  const Welcome answer{status, id_};
  if (hello.purpose == Purpose::kAnswer && link != nullptr) {
    link->ask_on(std::move(socket), [&](Socket &asking) { asking.write(answer, deadline); });
    return;
  }
  socket.write(answer, deadline);
  if (hello.purpose == Purpose::kAsk && status == LLM_SUCCESS && link != nullptr) link->answer_on(std::move(socket));
}

Status LlmDataDist::Engine::welcome_link(const Hello &hello) {
  if (hello.cluster_id == id_) return LLM_SUCCESS;
  const std::shared_ptr<Link> link = find(hello.cluster_id);
  if (link != nullptr && hello.force == 0) return LLM_ALREADY_LINK;
  forget(hello.cluster_id);
  std::lock_guard<std::mutex> lock(guard_);
  links_[hello.cluster_id] = std::make_shared<Link>(caches);
  return LLM_SUCCESS;
}

// ---- linking

std::shared_ptr<Link> LlmDataDist::Engine::find(uint64_t cluster_id) {
  std::lock_guard<std::mutex> lock(guard_);
  const auto found = links_.find(cluster_id);
  return found != links_.end() ? found->second : nullptr;
}

// forget drops a link, where there is one, and waits for the transfer that is under way on it.
void LlmDataDist::Engine::forget(uint64_t cluster_id) {
  const std::shared_ptr<Link> link = find(cluster_id);
  if (link == nullptr) return;
  {
    std::lock_guard<std::mutex> lock(guard_);
    links_.erase(cluster_id);
  }
  link->end();
}

namespace {

Status overall(const std::vector<Status> &each) {
  const auto failed = std::find_if(each.rbegin(), each.rend(), [](Status status) { return status != LLM_SUCCESS; });
  return failed != each.rend() ? *failed : LLM_SUCCESS;
}

void check_clusters(const std::vector<ClusterInfo> &clusters, int32_t timeout_ms) {
  require(timeout_ms > 0 && !clusters.empty());
  for (const ClusterInfo &cluster : clusters) {
    for (const auto *infos : {&cluster.local_ip_infos, &cluster.remote_ip_infos}) {
      for (const IpInfo &info : *infos) require(is_ip(AF_INET, info.ip.GetString()));
    }
  }
}

// each_of makes a call for each cluster, several at once, and appends the results in their order.
template <typename Call>
Status each_of(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets, Call &&call) {
  std::vector<Status> each(clusters.size());
  for (size_t begin = 0; begin < clusters.size(); begin += kLinkThreads) {
    std::vector<std::thread> threads;
    for (size_t i = begin; i < std::min(begin + kLinkThreads, clusters.size()); i++) {
      threads.emplace_back([&, i] { each[i] = call(clusters[i]); });
    }
    for (std::thread &thread : threads) thread.join();
  }
  rets.insert(rets.end(), each.begin(), each.end());
  return overall(each);
}

// dial says hello to the listener of a cluster.
std::pair<Socket, Welcome> dial(const ClusterInfo &cluster, const Hello &hello, Deadline deadline) {
  const IpInfo &remote = cluster.remote_ip_infos.front();
  Socket socket = Socket::connect(remote.ip.GetString(), remote.port, deadline);
  socket.write(hello, deadline);
  const auto welcome = socket.read<Welcome>(deadline);
  return {std::move(socket), welcome};
}

}  // namespace

Status LlmDataDist::Engine::link(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets, int32_t timeout_ms) {
  check_ready();
  check_clusters(clusters, timeout_ms);
  const Deadline deadline = in_millis(timeout_ms);
  return each_of(clusters, rets, [&](const ClusterInfo &cluster) {
    return standin::as_planned("link", [&] { return link_one(cluster, deadline); });
  });
}

Status LlmDataDist::Engine::link_one(const ClusterInfo &cluster, Deadline deadline) {
  const bool malformed = !communication_.empty() && communication_.find("\"version\"") == std::string::npos;
  const bool local_needed = communication_.empty() && !generated_;
  if (cluster.remote_ip_infos.size() != 1 || malformed) return LLM_PARAM_INVALID;
  if (local_needed && cluster.local_ip_infos.size() != 1) return LLM_PARAM_INVALID;
  const std::shared_ptr<Link> there = find(cluster.remote_cluster_id);
  const bool have = there != nullptr && there->live();
  try {
    Hello hello;
    hello.cluster_id = id_;
    hello.force = have ? 0 : 1;
    auto [asking, welcome] = dial(cluster, hello, deadline);
    if (welcome.status != LLM_SUCCESS || welcome.cluster_id == id_) return static_cast<Status>(welcome.status);
    hello.purpose = Purpose::kAnswer;
    auto [answering, again] = dial(cluster, hello, deadline);
    auto link = std::make_shared<Link>(caches);
    link->ask_on(std::move(asking), [](Socket &) {});
    link->answer_on(std::move(answering));
    forget(welcome.cluster_id);
    std::lock_guard<std::mutex> lock(guard_);
    links_[welcome.cluster_id] = std::move(link);
    return LLM_SUCCESS;
  } catch (const standin::Broken &) {
    return LLM_LINK_FAILED;
  } catch (const standin::TimedOut &) {
    return LLM_TIMEOUT;
  }
}

Status LlmDataDist::Engine::unlink(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets, int32_t timeout_ms, bool force) {
  check_ready();
  check_clusters(clusters, timeout_ms);
  const Deadline deadline = in_millis(timeout_ms);
  return each_of(clusters, rets, [&](const ClusterInfo &cluster) { return unlink_one(cluster, deadline, force); });
}

Status LlmDataDist::Engine::unlink_one(const ClusterInfo &cluster, Deadline deadline, bool force) {
  if (!force) {
    if (cluster.remote_ip_infos.size() != 1) return LLM_PARAM_INVALID;
    try {
      Hello hello;
      hello.purpose = Purpose::kUnlink;
      hello.cluster_id = id_;
      dial(cluster, hello, deadline);
    } catch (const standin::Broken &) {
      return LLM_UNLINK_FAILED;
    } catch (const standin::TimedOut &) {
      return LLM_TIMEOUT;
    }
  }
  forget(cluster.remote_cluster_id);
  return LLM_SUCCESS;
}

// ---- transfers

std::shared_ptr<Link> LlmDataDist::Engine::linked(uint64_t cluster_id) {
  std::shared_ptr<Link> link = find(cluster_id);
  if (link == nullptr) throw Failure{LLM_NOT_YET_LINK};
  return link;
}

Status LlmDataDist::Engine::pull_row(const CacheIndex &src, const Cache &dst, uint32_t row, int64_t size, const KvCacheExtParam &ext) {
  check_ready();
  standin::check_layers(ext);
  require((size == -1 || size > 0) && src.cluster_id != id_);
  const Entry local = caches.find(dst.cache_id);
  const uint64_t bytes = size > 0 ? static_cast<uint64_t>(size) : local.row_bytes;
  require(row < local.rows && bytes <= local.row_bytes);
  const standin::Layers layers = standin::pulled_layers(ext, local);
  linked(src.cluster_id)->transfer(standin::Direction::kPull, src.cache_id, in_millis(sync_ms_), [&](const Entry &remote) {
    return standin::pull_row(layers, local, row, remote, src.batch_index, bytes);
  });
  return LLM_SUCCESS;
}

Status LlmDataDist::Engine::pull_blocks(const CacheIndex &src, const Cache &dst, const standin::Blocks &src_blocks,
                                        const standin::Blocks &dst_blocks, const KvCacheExtParam &ext) {
  check_ready();
  standin::check_layers(ext);
  standin::check_blocks(src_blocks, dst_blocks);
  require(src.batch_index == 0 && src.cluster_id != id_);
  const Entry local = caches.find(dst.cache_id);
  const standin::Layers layers = standin::pulled_layers(ext, local);
  linked(src.cluster_id)->transfer(standin::Direction::kPull, src.cache_id, in_millis(sync_ms_), [&](const Entry &remote) {
    return standin::pull_blocks(layers, local, dst_blocks, remote, src_blocks);
  });
  return LLM_SUCCESS;
}

// push pushes one layer after the other; plan makes the pieces of one.
Status LlmDataDist::Engine::push(const Cache &src, const CacheIndex &dst, const KvCacheExtParam &ext, const PushLayer &plan) {
  standin::check_layers(ext);
  int64_t first = ext.src_layer_range.first;
  int64_t last = ext.src_layer_range.second;
  int64_t dst_first = ext.dst_layer_range.first;
  require(last - first == ext.dst_layer_range.second - dst_first);
  require(src.cache_desc.placement == CachePlacement::kDevice && dst.cluster_id != id_);
  if (first < 0) {  // all layers of the description that was passed, not of the cache
    require(src.cache_desc.num_tensors > 0);
    first = dst_first = 0;
    last = (src.cache_desc.num_tensors + ext.tensor_num_per_layer - 1) / ext.tensor_num_per_layer - 1;
  }
  const Entry local = caches.find(src.cache_id);
  const std::shared_ptr<Link> link = linked(dst.cluster_id);
  std::lock_guard<std::mutex> lock(pushing_);
  for (int64_t layer = first; layer <= last; layer++) {
    const auto layers = standin::pushed_layer(layer, dst_first + layer - first, ext.tensor_num_per_layer, local);
    link->transfer(standin::Direction::kPush, dst.cache_id, in_millis(sync_ms_),
                   [&](const Entry &remote) { return plan(layers, local, remote); });
  }
  return LLM_SUCCESS;
}

Status LlmDataDist::Engine::push_row(const Cache &src, const CacheIndex &dst, uint32_t row, int64_t size, const KvCacheExtParam &ext) {
  check_ready();
  require(size == -1);
  return push(src, dst, ext, [&](const standin::Layers &layers, const Entry &local, const Entry &remote) {
    return standin::push_row(layers, local, row, remote, dst.batch_index);
  });
}

Status LlmDataDist::Engine::push_blocks(const Cache &src, const CacheIndex &dst, const standin::Blocks &src_blocks,
                                        const standin::Blocks &dst_blocks, const KvCacheExtParam &ext) {
  check_ready();
  standin::check_blocks(src_blocks, dst_blocks);
  require(dst.batch_index == 0);
  return push(src, dst, ext, [&](const standin::Layers &layers, const Entry &local, const Entry &remote) {
    return standin::push_blocks(layers, local, src_blocks, remote, dst_blocks);
  });
}

// ---- the class

namespace {

// entry runs a member as planned and makes a status of what it throws.
template <typename Work>
Status entry(const char *name, Work &&work) {
  return standin::as_planned(name, [&]() -> Status {
    try {
      return work();
    } catch (const Failure &failure) {
      return failure.status;
    }
  });
}

Status unsupported(const char *name) {
  return entry(name, [] { return LLM_FEATURE_NOT_ENABLED; });
}

}  // namespace

LlmDataDist::LlmDataDist(uint64_t cluster_id, LlmRole role) : engine_(std::make_unique<Engine>(cluster_id, role)) {}

LlmDataDist::~LlmDataDist() = default;

Status LlmDataDist::Initialize(const Options &options) {
  return entry("Initialize", [&] { return engine_->initialize(options); });
}

void LlmDataDist::Finalize() {
  entry("Finalize", [&] {
    engine_->finalize();
    return LLM_SUCCESS;
  });
}

Status LlmDataDist::SetRole(LlmRole role, const Options &options) {
  return entry("SetRole", [&] { return engine_->set_role(role, options); });
}

Status LlmDataDist::LinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets, int32_t timeout_in_millis) {
  return entry("LinkLlmClusters", [&] { return engine_->link(clusters, rets, timeout_in_millis); });
}

Status LlmDataDist::UnlinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets, int32_t timeout_in_millis,
                                      bool force_flag) {
  return entry("UnlinkLlmClusters", [&] { return engine_->unlink(clusters, rets, timeout_in_millis, force_flag); });
}

Status LlmDataDist::AllocateCache(const CacheDesc &, Cache &) { return unsupported("AllocateCache"); }

Status LlmDataDist::DeallocateCache(int64_t) { return unsupported("DeallocateCache"); }

Status LlmDataDist::PullKvCache(const CacheIndex &src, const Cache &dst, uint32_t batch_index, int64_t size, const KvCacheExtParam &ext) {
  return entry("PullKvCache", [&] { return engine_->pull_row(src, dst, batch_index, size, ext); });
}

Status LlmDataDist::PullKvBlocks(const CacheIndex &src, const Cache &dst, const std::vector<uint64_t> &src_blocks,
                                 const std::vector<uint64_t> &dst_blocks, const KvCacheExtParam &ext) {
  return entry("PullKvBlocks", [&] { return engine_->pull_blocks(src, dst, src_blocks, dst_blocks, ext); });
}

Status LlmDataDist::CopyKvCache(const Cache &, const Cache &, uint32_t, uint32_t, uint64_t, int64_t) { return unsupported("CopyKvCache"); }

Status LlmDataDist::CopyKvBlocks(const Cache &, const Cache &, const std::vector<uint64_t> &, const std::vector<std::vector<uint64_t>> &) {
  return unsupported("CopyKvBlocks");
}

Status LlmDataDist::PushKvCache(const Cache &src, const CacheIndex &dst, uint32_t src_batch_index, int64_t size,
                                const KvCacheExtParam &ext) {
  return entry("PushKvCache", [&] { return engine_->push_row(src, dst, src_batch_index, size, ext); });
}

Status LlmDataDist::PushKvBlocks(const Cache &src, const CacheIndex &dst, const std::vector<uint64_t> &src_blocks,
                                 const std::vector<uint64_t> &dst_blocks, const KvCacheExtParam &ext) {
  return entry("PushKvBlocks", [&] { return engine_->push_blocks(src, dst, src_blocks, dst_blocks, ext); });
}

Status LlmDataDist::RegisterKvCache(const CacheDesc &desc, const std::vector<uint64_t> &addrs, const RegisterCfg &, int64_t &cache_id) {
  return entry("RegisterKvCache", [&] {
    engine_->check_ready();
    cache_id = engine_->caches.add(desc, addrs);
    return LLM_SUCCESS;
  });
}

Status LlmDataDist::UnregisterKvCache(int64_t cache_id) {
  return entry("UnregisterKvCache", [&] {
    engine_->check_ready();
    engine_->caches.remove(cache_id);
    return LLM_SUCCESS;
  });
}

}  // namespace llm_datadist
