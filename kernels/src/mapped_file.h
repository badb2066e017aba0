// Memory that is a file's, as ONNX Runtime maps weights: its pages come by themselves when they are read, and stay.
#pragma once
#include <cstddef>
#include <cstdint>

namespace edgellm {

// Give back the pages that some bytes are on, which come back when they are read again; only if all are a file's.
void forget(const void* bytes, size_t size);

// The part of a file that some bytes are mapped from, to be read without mapping it.
class MappedFile {
 public:
  MappedFile(const void* bytes, size_t size);  // finds the file, or not
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  bool found() const { return file_ >= 0; }
  // Read `size` bytes from `at` on; false where that fails. Any thread may.
  bool read(size_t at, size_t size, uint8_t* to) const;

 private:
  int file_ = -1;
  size_t start_ = 0;
};

}  // namespace edgellm
