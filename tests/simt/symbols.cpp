#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

namespace simt {
namespace {

std::string demangled(const char* name) {
  int status = 0;
  char* readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string text = status == 0 ? readable : name;
  std::free(readable);
  // Without the parameters and the type of a template's result, which say nothing new.
  if (status == 0 && text.back() == ')') {
    size_t depth = 0, i = text.size();
    do {
      --i;
      depth += text[i] == ')', depth -= text[i] == '(';
    } while (depth != 0 && i > 0);
    text.resize(i);
    if (text.rfind("void ", 0) == 0) text.erase(0, 5);
  }
  return text;
}

// Kernels are hidden, so the loader does not know their names; the file's own table of symbols does.
std::string symbol(const void* code) {
  Dl_info where;
  if (!dladdr(code, &where) || !where.dli_fname) return "";
  std::ifstream stream(where.dli_fname, std::ios::binary);
  const std::vector<char> file{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  if (file.size() < sizeof(ElfW(Ehdr)) || std::memcmp(file.data(), ELFMAG, SELFMAG) != 0) return "";
  const auto address = uintptr_t(code) - uintptr_t(where.dli_fbase);
  const auto& header = *reinterpret_cast<const ElfW(Ehdr)*>(file.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(file.data() + header.e_shoff);
  for (int i = 0; i < header.e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(file.data() + sections[i].sh_offset);
    for (size_t k = 0; k < sections[i].sh_size / sizeof(ElfW(Sym)); ++k)
      if (symbols[k].st_value == address && symbols[k].st_size > 0) return names + symbols[k].st_name;
  }
  return "";
}

}  // namespace

std::string function_name(const void* code) {
  const std::string name = symbol(code);
  return name.empty() ? "a kernel" : "kernel " + demangled(name.c_str());
}

std::string line_of(const void* code) {
  Dl_info where;
  if (!dladdr(code, &where) || !where.dli_fname) return "?";
  char command[4096];
  const auto address = uintptr_t(code) - uintptr_t(where.dli_fbase) - 1;  // within the call
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' %zx 2>/dev/null", where.dli_fname, size_t(address));
  std::string all;
  if (FILE* pipe = popen(command, "r")) {
    char line[1024];
    for (int depth = 0; depth < 8 && std::fgets(line, sizeof(line), pipe); ++depth) {
      std::string text = line;
      text = text.substr(text.rfind('/') + 1);
      text = text.substr(0, text.find_first_of(" \n"));
      if (text[0] != '?' && text.rfind("simt.h:", 0) != 0) all += (all.empty() ? "" : " in ") + text;
    }
    pclose(pipe);
  }
  return all.empty() ? "?" : all;
}

}  // namespace simt
