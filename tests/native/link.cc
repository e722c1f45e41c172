// SPDX-License-Identifier: Apache-2.0

#include "link.h"

#include <algorithm>

#include "standin.h"

using namespace llm_datadist;

namespace standin {
namespace {

enum Operation : uint64_t { kTable, kRead, kWrite };

struct Request {
  uint64_t operation;
  uint64_t address;
  uint64_t bytes;
};

constexpr uint64_t kMostBytes = 1 << 20;  // of one request

}  // namespace

void Link::end() {
  std::lock_guard<std::mutex> lock(guard_);
  broken_ = true;
  if (asking_.open()) asking_.shut();
  if (answering_.open()) answering_.shut();
  if (answerer_.joinable()) answerer_.join();
}

void Link::answer_on(Socket socket) {
  std::lock_guard<std::mutex> lock(guard_);
  answering_ = std::move(socket);
  answerer_ = std::thread([this] {
    try {
      for (;;) answer();
    } catch (const Broken &) {
      gone_ = true;
    }
  });
}

void Link::ask_on(Socket socket, const std::function<void(Socket &)> &welcome) {
  std::lock_guard<std::mutex> lock(guard_);
  welcome(socket);
  asking_ = std::move(socket);
}

void Link::answer() {
  const auto request = answering_.read<Request>(kNever);
  if (request.bytes > kMostBytes) throw Broken{};
  std::vector<unsigned char> content(request.bytes);
  std::vector<uint64_t> table;
  if (request.operation == kWrite) answering_.read(content.data(), content.size(), kNever);
  const Status status = as_planned("serve", [&]() -> Status {
    if (request.operation == kTable) {
      table = ours_.packed();
      return LLM_SUCCESS;
    }
    if (!ours_.reachable(request.address, request.bytes)) return kDeviceMemoryError;
    const int failed = request.operation == kRead ? standin_read(content.data(), request.address, request.bytes)
                                                  : standin_write(request.address, content.data(), request.bytes);
    return failed != 0 ? kDeviceMemoryError : LLM_SUCCESS;
  });
  answering_.write(status, kNever);
  if (status != LLM_SUCCESS) return;
  if (request.operation == kRead) answering_.write(content.data(), content.size(), kNever);
  if (request.operation == kTable) {
    answering_.write<uint64_t>(table.size(), kNever);
    answering_.write(table.data(), table.size() * sizeof(uint64_t), kNever);
  }
}

void Link::transfer(Direction direction, int64_t remote_cache, Deadline deadline,
                    const std::function<std::vector<Piece>(const Entry &)> &plan) {
  std::lock_guard<std::mutex> lock(guard_);
  if (broken_ || gone_ || !asking_.open()) throw Failure{kSuspectRemote};
  try {
    if (!table_) table_ = fetch_table(deadline);
    const auto found = table_->find(remote_cache);
    if (found == table_->end()) throw Failure{LLM_KV_CACHE_NOT_EXIST};
    for (const Piece &piece : plan(found->second)) {
      for (uint64_t done = 0; done < piece.bytes; done += kMostBytes) {
        move(direction, {piece.local + done, piece.remote + done, std::min(kMostBytes, piece.bytes - done)}, deadline);
      }
    }
  } catch (const Broken &) {
    broken_ = true;
    throw Failure{kSuspectRemote};
  } catch (const TimedOut &) {
    broken_ = true;
    throw Failure{LLM_TIMEOUT};
  }
}

void Link::move(Direction direction, const Piece &piece, Deadline deadline) {
  std::vector<unsigned char> content(piece.bytes);
  const bool pull = direction == Direction::kPull;
  if (!pull && standin_read(content.data(), piece.local, piece.bytes) != 0) throw Failure{kDeviceMemoryError};
  asking_.write(Request{pull ? kRead : kWrite, piece.remote, piece.bytes}, deadline);
  if (!pull) asking_.write(content.data(), content.size(), deadline);
  const auto status = asking_.read<Status>(deadline);
  if (status != LLM_SUCCESS) throw Failure{status};
  if (!pull) return;
  asking_.read(content.data(), content.size(), deadline);
  if (standin_write(piece.local, content.data(), piece.bytes) != 0) throw Failure{kDeviceMemoryError};
}

Table Link::fetch_table(Deadline deadline) {
  asking_.write(Request{kTable, 0, 0}, deadline);
  const auto status = asking_.read<Status>(deadline);
  if (status != LLM_SUCCESS) throw Failure{status};
  std::vector<uint64_t> words(asking_.read<uint64_t>(deadline));
  asking_.read(words.data(), words.size() * sizeof(uint64_t), deadline);
  return Caches::unpacked(words);
}

}  // namespace standin
