#include "registry.h"

#include <deque>
#include <map>
#include <mutex>
#include <utility>

namespace jax_gemma_arf {
namespace {

struct Registry {
  std::mutex mutex;
  // The last made is in use. There are others where XLA has given a new communicator the address of
  // one that is gone. A deque never moves what it holds.
  std::map<RegistryKey, std::deque<Workspace>> workspaces;
};

Registry& GetRegistry() {
  static auto* const registry = new Registry();
  return *registry;
}

}  // namespace

const Workspace* FindWorkspace(const RegistryKey& key) {
  Registry& registry = GetRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.workspaces.find(key);
  return found == registry.workspaces.end() ? nullptr : &found->second.back();
}

const Workspace* RegisterWorkspace(const RegistryKey& key, Workspace workspace) {
  Registry& registry = GetRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  return &registry.workspaces[key].emplace_back(std::move(workspace));
}

std::vector<WorkspaceReport> ReportWorkspaces() {
  std::vector<const RankWorkspace*> all;
  {
    Registry& registry = GetRegistry();
    const std::lock_guard<std::mutex> lock(registry.mutex);
    for (const auto& [key, made] : registry.workspaces) {
      for (const Workspace& workspace : made) {
        for (const auto& part : workspace) all.push_back(part.get());
      }
    }
  }
  std::vector<WorkspaceReport> reports;
  for (const RankWorkspace* part : all) {  // reads device memory: without the lock
    const WorkspaceSpec& spec = part->spec();
    reports.push_back({part->device(), part->rank(), spec.nranks, Name(spec.algorithm),
                       spec.capacity, WorkspaceLayout(spec).total,
                       reinterpret_cast<uintptr_t>(part->base()), part->CheckGuards()});
  }
  return reports;
}

}  // namespace jax_gemma_arf
