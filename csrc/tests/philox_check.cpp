// philox_check.cpp -- the generator against Random123's published answers.
//
//   philox_check [tests/ops/data/philox4x32.txt]
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>

#include "../philox.h"

int main(int argc, char** argv) {
  const char* path = argc > 1 ? argv[1] : "tests/ops/data/philox4x32.txt";
  std::ifstream file(path);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path);
    return 1;
  }
  int answers = 0, wrong = 0;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream words(line);
    uint32_t counter[4], key[2], expected[4];
    for (uint32_t& word : counter) words >> std::hex >> word;
    for (uint32_t& word : key) words >> std::hex >> word;
    for (uint32_t& word : expected) words >> std::hex >> word;
    if (!words) {
      std::fprintf(stderr, "%s: cannot read \"%s\"\n", path, line.c_str());
      return 1;
    }
    zo2ext::philox4x32_10(counter, key[0] | uint64_t{key[1]} << 32);
    for (int i = 0; i < 4; ++i) {
      if (counter[i] == expected[i]) continue;
      std::fprintf(stderr, "answer %d, word %d: %08x, published %08x\n", answers, i, counter[i],
                   expected[i]);
      ++wrong;
    }
    ++answers;
  }
  std::printf("philox4x32-10: %d published answers, %d words wrong\n", answers, wrong);
  return answers == 0 || wrong != 0;
}
