#include "mapped_file.h"

#if defined(__linux__)

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

namespace edgellm {
namespace {

// The pages that some bytes are on: number of the first, and of the one after the last.
struct Pages {
  Pages(const void* bytes, size_t size) : page(sysconf(_SC_PAGESIZE)) {
    const size_t address = reinterpret_cast<size_t>(bytes);
    first = address / page, last = (address + size + page - 1) / page;
  }
  size_t page, first, last;
};

// Whether the pages that are in memory are all a file's, as it is. A page of memory that is no file's would be lost, one
// that was written to would come back as it was before; the system says of each which it is
// (Documentation/admin-guide/mm/pagemap.rst).
bool of_file(const Pages& all) {
  constexpr uint64_t kThere = 1ull << 63, kSwapped = 1ull << 62, kOfFile = 1ull << 61;
  std::vector<uint64_t> pages(all.last - all.first);
  const size_t wanted = pages.size() * sizeof(uint64_t);
  const int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (map < 0) return false;
  const ssize_t got = pread(map, pages.data(), wanted, off_t(all.first * sizeof(uint64_t)));
  close(map);
  if (got != ssize_t(wanted)) return false;
  for (const uint64_t flags : pages)
    if (flags & kSwapped || (flags & kThere && !(flags & kOfFile))) return false;
  return true;
}

}  // namespace

void forget(const void* bytes, size_t size) {
  const Pages all(bytes, size);
  if (size == 0 || !of_file(all)) return;
  madvise(reinterpret_cast<void*>(all.first * all.page), (all.last - all.first) * all.page, MADV_DONTNEED);
}

MappedFile::MappedFile(const void* bytes, size_t size) {
  const size_t address = reinterpret_cast<size_t>(bytes);
  if (!of_file(Pages(bytes, size))) return;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long long begin = 0, end = 0, offset = 0, number = 0;
    unsigned int high = 0, low = 0;
    int name = 0;
    const char* form = "%llx-%llx %*4s %llx %x:%x %llu %n";
    if (std::sscanf(line.c_str(), form, &begin, &end, &offset, &high, &low, &number, &name) < 6) continue;
    if (address < begin || address + size > end) continue;
    const int file = open(line.c_str() + name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    struct stat about;
    if (file < 0) return;
    // the very file, not another of its name
    const bool same = fstat(file, &about) == 0 && S_ISREG(about.st_mode) && about.st_ino == number &&
                      major(about.st_dev) == high && minor(about.st_dev) == low;
    if (same) file_ = file, start_ = size_t(offset) + (address - begin);
    else close(file);
    return;
  }
}

MappedFile::~MappedFile() {
  if (file_ >= 0) close(file_);
}

bool MappedFile::read(size_t at, size_t size, uint8_t* to) const {
  return pread(file_, to, size, off_t(start_ + at)) == ssize_t(size);
}

}  // namespace edgellm

#else

namespace edgellm {

void forget(const void*, size_t) {}
MappedFile::MappedFile(const void*, size_t) {}
MappedFile::~MappedFile() {}
bool MappedFile::read(size_t, size_t, uint8_t*) const { return false; }

}  // namespace edgellm

#endif
