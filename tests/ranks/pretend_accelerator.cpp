// A device type of its own, "PrivateUse1" to torch, whose memory is the host's and whose arithmetic is the CPU's.
// Tensors on it are no CPU tensors: an operation that mixes both, other than a copy, is refused as on a GPU.

#define TORCH_ASSERT_ONLY_METHOD_OPERATORS  // compiles in a third of the time
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

namespace {

constexpr auto kPretend = c10::DeviceType::PrivateUse1;
std::atomic<int64_t> allocated{0}, peak{0}, operations{0}, pieces{0}, streams{0};
std::mutex freeing;
std::vector<int64_t> freed;

// What stands before each piece of memory.
struct Header {
  int64_t bytes, number;
};

Header* header_of(void* block) {
  return reinterpret_cast<Header*>(static_cast<char*>(block) - 64);
}

void give_back(void* block) {
  if (block != nullptr) {
    auto* header = header_of(block);
    allocated -= header->bytes;
    {
      const std::lock_guard<std::mutex> lock(freeing);
      freed.push_back(header->number);
    }
    c10::free_cpu(header);
  }
}

// The numbers of the pieces that were freed since the last call.
std::vector<int64_t> freed_since() {
  const std::lock_guard<std::mutex> lock(freeing);
  return std::exchange(freed, {});
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kPretend, 0);
    if (bytes == 0) {
      return {nullptr, nullptr, &give_back, device};
    }
    auto* start = static_cast<char*>(c10::alloc_cpu(bytes + 64));
    *reinterpret_cast<Header*>(start) = {static_cast<int64_t>(bytes), ++pieces};
    const int64_t now = allocated += static_cast<int64_t>(bytes);
    for (int64_t seen = peak; seen < now && !peak.compare_exchange_weak(seen, now);) {
    }
    return {start + 64, start + 64, &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &give_back;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kPretend, &allocator);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kPretend> {
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  c10::Device getDevice() const override {
    return {kPretend, 0};
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return {kPretend, 0};
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return stream();
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return stream();
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, ++streams);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return stream();
  }

 private:
  static c10::Stream stream() {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kPretend, 0));
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetAllocator(c10::DeviceType::CPU);
  }
  bool isPinnedPtr(const void*) const override {
    return false;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};
Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

at::Tensor on_host(const at::Tensor& tensor) {
  return tensor.device().type() == kPretend
      ? at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU))
      : tensor;
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

const at::Tensor& resize_on_device(const at::Tensor& tensor, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(tensor.unsafeGetTensorImpl(), size, std::nullopt);
  return tensor;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) {
    resize_on_device(to, from.sizes(), std::nullopt);
  }
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) {
  return on_host(tensor).item();
}

at::Tensor& set_storage_at(
    at::Tensor& tensor, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(tensor, std::move(storage), offset, size, stride);
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return set_storage_at(tensor, std::move(storage), 0, {elements}, {1});
}

void record_stream(at::Tensor&, c10::Stream) {}

void refuse_host(const c10::OperatorHandle& op, const at::Tensor& tensor) {
  TORCH_CHECK(
      !tensor.defined() || tensor.dim() == 0 || tensor.device().type() == kPretend, op.schema().operator_name(),
      " mixes a tensor of this device with one of ", tensor.device());
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  ++operations;
  for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    // Indices may lie on the host, as on a GPU.
    if (argument.isTensor()) {
      refuse_host(op, argument.toTensor());
    } else if (argument.isTensorList()) {
      for (const at::Tensor& tensor : argument.toTensorVector()) {
        refuse_host(op, tensor);
      }
    }
  }
  at::native::cpu_fallback(op, stack);
}

} // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("resize_", &resize_on_device);
  m.impl("record_stream", &record_stream);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage_at);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("allocated", [] { return allocated.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("operations", [] { return operations.load(); });
  m.def("number", [](int64_t block) { return header_of(reinterpret_cast<void*>(block))->number; });
  m.def("freed", &freed_since);
}
