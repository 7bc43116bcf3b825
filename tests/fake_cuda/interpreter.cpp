#include "tests/fake_cuda/interpreter.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "backends/json.h"

namespace et_moe::fake_cuda {
namespace {

// The file descriptors under which the process finds what it inherits.
constexpr int kSocket = 3, kMemory = 4;

/// This process's environment without what belongs to its libraries.
std::vector<std::string> child_environment() {
  std::vector<std::string> result = {"TRITON_INTERPRET=1", "CUDA_VISIBLE_DEVICES="};
  for (char** entry = environ; *entry; ++entry) {
    const std::string text = *entry;
    const bool ours = text.rfind("LD_", 0) == 0 || text.rfind("ASAN_", 0) == 0 ||
                      text.rfind("TRITON_INTERPRET=", 0) == 0 ||
                      text.rfind("CUDA_VISIBLE_DEVICES=", 0) == 0;
    if (!ours) result.push_back(text);
  }
  return result;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (auto& text : texts) result.push_back(text.data());
  result.push_back(nullptr);
  return result;
}

std::string hexadecimal(const std::string& bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (unsigned char byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace

Interpreter::Interpreter(const std::string& sidecar, const Memory& memory) {
  int sockets[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) != 0) {
    throw std::runtime_error(std::string("no socket for the interpreter: ") + std::strerror(errno));
  }
  socket_ = sockets[0];
  std::vector<std::string> arguments = {ET_MOE_PYTHON,
                                        ET_MOE_INTERPRETER,
                                        sidecar,
                                        std::to_string(kSocket),
                                        std::to_string(kMemory),
                                        std::to_string(Memory::kBase),
                                        std::to_string(Memory::kSize)};
  std::vector<std::string> environment = child_environment();
  // These numbers are far from the targets, so that neither duplication overwrites the other's
  // source.
  const int socket_source = fcntl(sockets[1], F_DUPFD_CLOEXEC, 100);
  const int memory_source = fcntl(memory.file(), F_DUPFD_CLOEXEC, 100);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, socket_source, kSocket);
  posix_spawn_file_actions_adddup2(&actions, memory_source, kMemory);
  const int error = posix_spawn(&process_, ET_MOE_PYTHON, &actions, nullptr,
                                pointers(arguments).data(), pointers(environment).data());
  posix_spawn_file_actions_destroy(&actions);
  for (int file : {sockets[1], socket_source, memory_source}) close(file);
  if (error != 0) {
    close(socket_);
    throw std::runtime_error(std::string("the interpreter does not start: ") +
                             std::strerror(error));
  }
}

Interpreter::~Interpreter() {
  close(socket_);  // the process ends when it reads the end of the file
  waitpid(process_, nullptr, 0);
}

std::string Interpreter::request(const std::string& line) {
  const std::string text = line + "\n";
  for (size_t sent = 0; sent < text.size();) {
    const ssize_t count = send(socket_, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return "the interpreter has ended";
    sent += static_cast<size_t>(count);
  }
  std::string reply;
  char buffer[4096];
  while (reply.empty() || reply.back() != '\n') {
    const ssize_t count = recv(socket_, buffer, sizeof buffer, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return "the interpreter has ended";
    reply.append(buffer, static_cast<size_t>(count));
  }
  return parse_json(reply).at("error").get<std::string>();
}

std::string Interpreter::run(const Cubin& module, const Kernel& kernel, const Launch& launch,
                             const Memory& memory) {
  nlohmann::json message = {{"module", module.id},
                            {"kernel", kernel.name},
                            {"grid", launch.grid},
                            {"allocations", nlohmann::json::array()},
                            {"arguments", nlohmann::json::array()}};
  if (sent_.insert(module.id).second) message["image"] = hexadecimal(module.image);
  for (const auto& argument : launch.arguments) {
    message["arguments"].push_back(hexadecimal(argument));
  }
  for (const auto& [address, size] : memory.allocations()) {
    message["allocations"].push_back({address, size});
  }
  return request(to_text(message));
}

}  // namespace et_moe::fake_cuda
