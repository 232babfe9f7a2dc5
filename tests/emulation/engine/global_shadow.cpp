// Who wrote which byte of global memory in this launch. Blocks run in any order and at the same time on a
// device: none may touch what another one writes, except by atomics.
#include <unordered_map>

#include "block.h"

namespace cuda_cnn::emulation {

namespace {

struct Word {
  uint32_t writer[8] = {};  // of each byte: the number of the block, from 1; 0: nobody yet
};
std::unordered_map<uintptr_t, Word> words;

}  // namespace

void global_shadow_start_launch() { words.clear(); }

void global_shadow_access(const void* pointer, uint32_t bytes, Access access, const Site& site) {
  if (access == Access::kAtomic) return;
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  Word* word = nullptr;
  for (uintptr_t at = begin; at < begin + bytes; ++at) {
    if (word == nullptr || at % 8 == 0) {
      if (access == Access::kWrite) {
        word = &words[at / 8];
      } else {
        const auto found = words.find(at / 8);
        if (found == words.end()) {
          at |= 7;  // nobody wrote here: on to the next word
          continue;
        }
        word = &found->second;
      }
    }
    uint32_t& writer = word->writer[at % 8];
    if (writer != 0 && writer != block.number) {
      return report(false, site, "race: global %s of %p, which block %u of the same launch writes",
                    access == Access::kRead ? "read" : "write", reinterpret_cast<void*>(at), writer - 1);
    }
    if (access == Access::kWrite) writer = block.number;
  }
}

}  // namespace cuda_cnn::emulation
