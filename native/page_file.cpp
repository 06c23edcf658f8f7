#include "page_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <random>
#include <string_view>
#include <system_error>

#ifdef __linux__
#include <linux/magic.h>
#include <sys/vfs.h>
#endif

#include "error.h"

namespace edgert {
namespace {

static_assert(sizeof(off_t) == 8, "the file is larger than 2 GiB");
constexpr std::string_view kPrefix = "edgert-kv-", kSuffix = ".pages";

[[noreturn]] void fail(const std::string& directory, const char* what, int error) {
  throw EngineError("the KV cache cannot keep a file in " + directory + ": " + what + ": " +
                    std::generic_category().message(error) +
                    "; choose a directory on a disk that this user may write to");
}

// Empty files of this user that a store was killed over. Another store's that is just being made may be among
// them: its own unlink then finds it gone.
void remove_leftovers(const std::string& directory) {
  DIR* const entries = opendir(directory.c_str());
  if (!entries) return;
  while (const dirent* entry = readdir(entries)) {
    const std::string_view name = entry->d_name;
    struct stat status;
    if (name.starts_with(kPrefix) && name.ends_with(kSuffix) &&
        fstatat(dirfd(entries), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(status.st_mode) &&
        status.st_size == 0 && status.st_uid == geteuid())
      unlinkat(dirfd(entries), entry->d_name, 0);
  }
  closedir(entries);
}

}  // namespace

PageFile::PageFile(const std::string& directory) : directory_(directory) {
  std::error_code refused;
  std::filesystem::create_directories(directory, refused);
  if (refused) fail(directory, "the directory cannot be made", refused.value());
  remove_leftovers(directory);
  std::random_device random;
  std::string path;
  do {
    const uint64_t number = uint64_t(random()) << 32 | random();
    path = (std::filesystem::path(directory) /
            (std::string(kPrefix) + std::to_string(getpid()) + "-" + std::to_string(number) + std::string(kSuffix)))
               .string();
    fd_ = open(path.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
  } while (fd_ < 0 && errno == EEXIST);
  if (fd_ < 0) fail(directory, "no file can be made", errno);
  if (unlink(path.c_str()) != 0 && errno != ENOENT) {
    const int error = errno;
    close(fd_);
    fail(directory, "an open file cannot be unlinked", error);
  }
  // Not in open(): a file system that refuses the flag there leaves the file behind.
#ifdef O_DIRECT
  direct_ = fcntl(fd_, F_SETFL, O_DIRECT) == 0;
#elif defined(F_NOCACHE)
  direct_ = fcntl(fd_, F_NOCACHE, 1) == 0;
#endif
}

PageFile::~PageFile() { close(fd_); }

bool PageFile::in_memory() const {
#ifdef __linux__
  struct statfs system;
  return fstatfs(fd_, &system) == 0 && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC);
#else
  return false;
#endif
}

int PageFile::write(const uint8_t* src, size_t n, uint64_t at) const {
  [[maybe_unused]] const auto place = static_cast<off_t>(at);
  [[maybe_unused]] const auto bytes = static_cast<off_t>(n);
  while (n > 0) {
    const ssize_t put = pwrite(fd_, src, n, static_cast<off_t>(at));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return errno;
    const size_t whole = static_cast<size_t>(put) / kAlign * kAlign;
    if (whole == 0) return ENOSPC;
    src += whole, at += whole, n -= whole;
  }
  if (!direct_) {
    if (fsync(fd_) != 0) return errno;  // the system drops only what it has written, and tells errors only here
#ifdef POSIX_FADV_DONTNEED
    posix_fadvise(fd_, place, bytes, POSIX_FADV_DONTNEED);
#endif
  }
  return 0;
}

int PageFile::read(uint8_t* dst, size_t n, uint64_t at) const {
  [[maybe_unused]] const auto place = static_cast<off_t>(at);
  [[maybe_unused]] const auto bytes = static_cast<off_t>(n);
  while (n > 0) {
    const ssize_t got = pread(fd_, dst, n, static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    const size_t whole = static_cast<size_t>(got) / kAlign * kAlign;
    if (whole == 0) return kEndsEarly;
    dst += whole, at += whole, n -= whole;
  }
#ifdef POSIX_FADV_DONTNEED
  if (!direct_) posix_fadvise(fd_, place, bytes, POSIX_FADV_DONTNEED);
#endif
  return 0;
}

void PageFile::clear() const {
  [[maybe_unused]] const int refused = ftruncate(fd_, 0);  // then the space comes back when the file is closed
}

}  // namespace edgert
