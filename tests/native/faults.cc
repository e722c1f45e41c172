// SPDX-License-Identifier: Apache-2.0

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>

#include "standin.h"

namespace {

std::mutex planning;  // guards all of it
std::condition_variable released;
std::list<std::pair<std::string, StandinFault>> planned;
bool environment_read = false;
int waiting = 0;
uint64_t releases = 0;

// parse reads Entry=action:status[:millis].
bool parse(const std::string &text, std::pair<std::string, StandinFault> &fault) {
  const size_t equals = text.find('=');
  const size_t colon = text.find(':');
  if (equals == std::string::npos || colon == std::string::npos || colon < equals) return false;
  const std::string action = text.substr(equals + 1, colon - equals - 1);
  StandinFault read{action == "fail" ? kFail : action == "stall" ? kStall : action == "late" ? kLate : kNone, 0, 0};
  char *end = nullptr;
  read.status = static_cast<uint32_t>(std::strtoul(text.c_str() + colon + 1, &end, 0));
  if (*end == ':') read.millis = static_cast<int>(std::strtoul(end + 1, &end, 0));
  fault = {text.substr(0, equals), read};
  return read.action != kNone && *end == 0;
}

bool plan(const char *faults) {
  std::istringstream words(faults);
  for (std::string word; words >> word;) {
    std::pair<std::string, StandinFault> fault;
    if (!parse(word, fault)) return false;
    planned.push_back(fault);
  }
  return true;
}

// read_environment plans STANDIN_FAULTS once. The caller holds planning.
void read_environment() {
  if (std::exchange(environment_read, true)) return;
  const char *faults = std::getenv("STANDIN_FAULTS");
  if (faults != nullptr && !plan(faults)) {
    std::fprintf(stderr, "stand-in: STANDIN_FAULTS is not understood: %s\n", faults);
    std::abort();
  }
}

}  // namespace

int standin_plan(const char *faults) {
  std::lock_guard<std::mutex> lock(planning);
  read_environment();
  return plan(faults) ? 0 : -1;
}

int standin_forget(void) {
  std::lock_guard<std::mutex> lock(planning);
  read_environment();
  const auto unused = static_cast<int>(planned.size());
  planned.clear();
  return unused;
}

StandinFault standin_take(const char *entry) {
  std::lock_guard<std::mutex> lock(planning);
  read_environment();
  for (auto at = planned.begin(); at != planned.end(); ++at) {
    if (at->first == entry) {
      const StandinFault fault = at->second;
      planned.erase(at);
      return fault;
    }
  }
  return {kNone, 0, 0};
}

void standin_wait(int millis) {
  std::unique_lock<std::mutex> lock(planning);
  const uint64_t before = releases;
  waiting++;
  released.wait_for(lock, std::chrono::milliseconds(millis), [&] { return releases != before; });
  waiting--;
}

int standin_waiting(void) {
  std::lock_guard<std::mutex> lock(planning);
  return waiting;
}

void standin_release(void) {
  std::lock_guard<std::mutex> lock(planning);
  releases++;
  released.notify_all();
}
