// SPDX-License-Identifier: Apache-2.0

#include "library.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "cann_face.h"

namespace cann {
namespace {

constexpr const char *kKnownVersion = "hixl 9.2";
constexpr const char *kLibrary = "libllm_datadist.so";

// Newer toolkits have split the device runtime off libascendcl.so; a function is in one of the two.
constexpr const char *kRuntimes[] = {"libascendcl.so", "libacl_rt.so"};

// What libllm_datadist.so needs of its own folder. The libraries name each other without a path, so a folder that LD_LIBRARY_PATH does
// not list has to be gone through by hand.
constexpr const char *kNeeded[] = {"libc_sec.so",   "libalog.so",   "liberror_manager.so", "libmetadef.so",
                                   "libruntime.so", "libacl_rt.so", "libcann_hixl.so"};

struct Closer {
  void operator()(void *handle) const { dlclose(handle); }
};
using Handle = std::unique_ptr<void, Closer>;

struct Opened {
  Handle vendor;
  std::vector<Handle> runtimes;
  std::vector<Handle> needed;
};

// A place to look in. Without a folder the loader looks where it always does.
struct Place {
  std::string name;
  std::string folder;

  std::string path(const char *file) const { return folder.empty() ? file : folder + "/" + file; }
};

std::vector<Place> places(const std::string &folder) {
  if (!folder.empty()) return {{folder, folder}};
  std::vector<Place> found{{"by name (LD_LIBRARY_PATH)", ""}};
  for (const char *variable : {"ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"}) {
    const char *home = std::getenv(variable);
    if (home != nullptr && *home != 0) found.push_back({variable, std::string(home) + "/lib64"});
  }
  return found;
}

// Now: a library that lacks something it needs is refused here, not in the middle of its first call.
Handle open_library(const std::string &path) { return Handle(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)); }

std::string why() {
  const char *text = dlerror();
  return text != nullptr ? text : "no reason was given";
}

// open_needed opens what is there of kNeeded. Each may need others of them, so it goes on for as long as that helps.
std::vector<Handle> open_needed(const Place &place) {
  std::vector<Handle> opened;
  if (place.folder.empty()) return opened;
  std::vector<const char *> missing(std::begin(kNeeded), std::end(kNeeded));
  for (size_t before = missing.size() + 1; missing.size() < before;) {
    before = missing.size();
    missing.erase(std::remove_if(missing.begin(), missing.end(),
                                 [&](const char *file) {
                                   Handle handle = open_library(place.path(file));
                                   if (handle == nullptr) return false;
                                   opened.push_back(std::move(handle));
                                   return true;
                                 }),
                  missing.end());
  }
  return opened;
}

// open_in opens the libraries of a place; where one can't be, it adds the reason to reasons and returns nothing.
Opened open_in(const Place &place, std::string &reasons) {
  Opened opened;
  opened.needed = open_needed(place);
  opened.vendor = open_library(place.path(kLibrary));
  if (opened.vendor == nullptr) {
    reasons += "; " + place.name + ": " + why();
    return {};
  }
  std::string missing;
  for (const char *file : kRuntimes) {
    Handle handle = open_library(place.path(file));
    if (handle != nullptr) {
      opened.runtimes.push_back(std::move(handle));
    } else {
      missing += "; " + place.name + ": " + why();
    }
  }
  if (opened.runtimes.empty()) {
    reasons += missing;
    return {};
  }
  return opened;
}

Opened open(const std::string &folder) {
  std::string reasons;
  for (const Place &place : places(folder)) {
    Opened opened = open_in(place, reasons);
    if (opened.vendor != nullptr) return opened;
  }
  throw Refusal{CANN_FACE, CANN_CANNOT_LOAD, std::string("cannot load ") + kLibrary + " and the device runtime" + reasons};
}

std::string path_of(const Handle &handle) {
  link_map *map = nullptr;
  if (dlinfo(handle.get(), RTLD_DI_LINKMAP, &map) != 0 || map == nullptr) return "(unknown path)";
  return map->l_name;
}

void *find(const Handle &handle, const char *name) {
  void *address = dlsym(handle.get(), name);
  if (address != nullptr) return address;
  throw Refusal{CANN_FACE, CANN_MISSING_SYMBOL,
                path_of(handle) + ", and what it needs, has no " + name + ": it is of another version or C++ ABI than known here (" +
                    kKnownVersion + ")"};
}

void *find(const std::vector<Handle> &handles, const char *name) {
  for (const Handle &handle : handles) {
    if (void *address = dlsym(handle.get(), name)) return address;
  }
  return find(handles.back(), name);
}

template <typename Function>
void bind(Function *&function, void *address) {
  function = reinterpret_cast<Function *>(address);
}

// A pointer to a member that is not virtual is its address and a zero (Itanium C++ ABI).
template <typename Member>
void bind_member(Member &member, void *address) {
  const struct {
    void *address;
    ptrdiff_t adjustment;
  } words = {address, 0};
  static_assert(sizeof member == sizeof words, "pointers to members are not those of the Itanium C++ ABI");
  std::memcpy(&member, &words, sizeof member);
}

Members find_members(const Handle &library) {
  Members members;
  bind(members.construct, find(library, kConstructor));
  bind(members.destruct, find(library, kDestructor));
#define CANN_FIND(name, mangled) bind_member(members.name, find(library, mangled));
  CANN_MEMBERS(CANN_FIND)
#undef CANN_FIND
  return members;
}

Strings find_strings(const Handle &library) {
  Strings strings;
  bind(strings.construct, find(library, "_ZN2ge12AscendStringC1EPKc"));
  bind(strings.get, find(library, "_ZNK2ge12AscendString9GetStringEv"));
  bind(strings.length, find(library, "_ZNK2ge12AscendString9GetLengthEv"));
  bind(strings.less, find(library, "_ZNK2ge12AscendStringltERKS0_"));
  return strings;
}

Runtime find_runtime(const std::vector<Handle> &runtimes) {
  Runtime runtime;
#define CANN_FIND(name, type) bind(runtime.name, find(runtimes, #name));
  CANN_RUNTIME_FUNCTIONS(CANN_FIND)
#undef CANN_FIND
  return runtime;
}

// check_strings makes a string, too long to lie inside its object, and reads it back.
void check_strings(const Strings &strings) {
  constexpr const char *kText = "a text that no string keeps inside its own object";
  alignas(ge::AscendString) unsigned char room[kProbeRoom];
  mark(room);
  auto *text = reinterpret_cast<ge::AscendString *>(room);
  strings.construct(text, kText);
  refuse_changes(room, sizeof(ge::AscendString), "ge::AscendString");
  const bool same = std::strcmp(strings.get(text), kText) == 0 && strings.length(text) == std::strlen(kText);
  text->~AscendString();
  if (!same) throw Refusal{CANN_FACE, CANN_WRONG_ABI, "a ge::AscendString does not give back what it was made of"};
}

std::mutex loading;  // guards folder_of_current and the making of current
std::string folder_of_current;
std::atomic<const Library *> current{nullptr};

}  // namespace

void mark(unsigned char (&room)[kProbeRoom]) { std::memset(room, 0xA5, kProbeRoom); }

void refuse_changes(const unsigned char (&room)[kProbeRoom], size_t used, const char *what) {
  unsigned char untouched[kProbeRoom];
  mark(untouched);
  if (std::memcmp(room + used, untouched + used, kProbeRoom - used) == 0) return;
  throw Refusal{CANN_FACE, CANN_WRONG_ABI,
                std::string(what) + " is larger in this library than the " + std::to_string(used) + " bytes known here (" + kKnownVersion +
                    "): it has another C++ ABI"};
}

void load(const std::string &folder) {
  std::lock_guard<std::mutex> lock(loading);
  if (current.load() != nullptr) {
    if (folder.empty() || folder == folder_of_current) return;
    throw Refusal{CANN_FACE, CANN_NOT_LOADED, "the libraries were loaded already, from " + current.load()->paths.front()};
  }
  Opened opened = open(folder);
  auto library = std::make_unique<Library>();
  library->members = find_members(opened.vendor);
  library->strings = find_strings(opened.vendor);
  library->runtime = find_runtime(opened.runtimes);
  check_strings(library->strings);
  library->paths.push_back(path_of(opened.vendor));
  for (const Handle &handle : opened.runtimes) library->paths.push_back(path_of(handle));
  library->runtime.aclInit(nullptr);  // not zero where somebody has done it before; a runtime that is no use says so when it is asked
  folder_of_current = folder;
  current = library.release();
  for (Handle &handle : opened.needed) handle.release();
  for (Handle &handle : opened.runtimes) handle.release();
  opened.vendor.release();
}

const Library &loaded() {
  const Library *library = current.load(std::memory_order_acquire);
  if (library == nullptr) throw Refusal{CANN_FACE, CANN_NOT_LOADED, "the native libraries are not loaded: call cann_load first"};
  return *library;
}

}  // namespace cann

// What the containers of strings call.
namespace ge {

AscendString::AscendString(const char *text) { cann::loaded().strings.construct(this, text); }
const char *AscendString::GetString() const { return cann::loaded().strings.get(this); }
size_t AscendString::GetLength() const { return cann::loaded().strings.length(this); }
bool AscendString::operator<(const AscendString &other) const { return cann::loaded().strings.less(this, &other); }

}  // namespace ge
