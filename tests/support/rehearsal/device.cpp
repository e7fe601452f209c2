// A CUDA device that is not there: tensors whose device is cuda:0 and whose memory is the host's.
//
// Every operation on them goes to the CPU's kernel, over the same memory, after what a GPU would
// refuse has been refused: operands of two devices.  For PyTorch's builds without CUDA only, where
// nobody else serves that dispatch key.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

// What the autograd engine asks of a device: one of them, with one stream.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetDefaultCPUAllocator();
  }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

// A device's view of memory that a CPU tensor made, and the other way round.
c10::Storage moved(const c10::Storage& from, c10::Device device) {
  auto* keeper = new c10::Storage(from);
  c10::DataPtr data(keeper->mutable_data(), keeper,
                    [](void* held) { delete static_cast<c10::Storage*>(held); }, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), from.nbytes(), std::move(data),
                      c10::GetDefaultCPUAllocator(), /*resizable=*/true);
}

at::Tensor standing(const at::Tensor& like, c10::Storage storage, c10::DispatchKey key) {
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                    like.storage_offset());
  if (like.is_conj()) made.unsafeGetTensorImpl()->_set_conj(true);
  if (like.is_neg()) made.unsafeGetTensorImpl()->_set_neg(true);
  return made;
}

// One call, carried to the CPU and back.
struct Call {
  struct Alias {
    at::Tensor device, host;
    c10::StorageImpl* impl;  // of the host's, before the call
    const void* data;
  };
  std::vector<Alias> aliases;
  std::unordered_map<c10::StorageImpl*, c10::Storage> hosts;    // of the device's storages
  std::unordered_map<c10::StorageImpl*, c10::Storage> devices;  // of the hosts'
  bool seen_device = false, seen_host = false;

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      seen_host |= tensor.dim() > 0;
      return tensor;
    }
    seen_device = true;
    for (const Alias& alias : aliases)
      if (alias.device.is_same(tensor)) return alias.host;
    const at::Tensor host = standing(tensor, to_host(tensor.storage()), c10::DispatchKey::CPU);
    aliases.push_back({tensor, host, host.storage().unsafeGetStorageImpl(), host.storage().data()});
    return host;
  }

  c10::Storage to_host(const c10::Storage& storage) {
    if (!storage.device().is_cuda()) return storage;
    auto [found, fresh] = hosts.try_emplace(storage.unsafeGetStorageImpl());
    if (fresh) {
      found->second = moved(storage, c10::Device(c10::DeviceType::CPU));
      devices.emplace(found->second.unsafeGetStorageImpl(), storage);
    }
    return found->second;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (const Alias& alias : aliases)
      if (alias.host.is_same(tensor)) return alias.device;
    return standing(tensor, to_device(tensor.storage()), c10::DispatchKey::CUDA);
  }

  c10::Storage to_device(const c10::Storage& storage) {
    auto [found, fresh] = devices.try_emplace(storage.unsafeGetStorageImpl());
    if (fresh) found->second = moved(storage, kDevice);
    return found->second;
  }

  // What the call resized or gave other memory.
  void settle() {
    for (const Alias& alias : aliases) {
      c10::TensorImpl* device = alias.device.unsafeGetTensorImpl();
      const c10::Storage& now = alias.host.storage();
      if (now.data() != alias.data) {  // another's memory, or its own grown
        if (now.unsafeGetStorageImpl() == alias.impl) devices.erase(alias.impl);
        device->set_storage_keep_dtype(to_device(now));
      }
      if (alias.host.sizes() != alias.device.sizes() ||
          alias.host.strides() != alias.device.strides() ||
          alias.host.storage_offset() != alias.device.storage_offset())
        device->set_sizes_and_strides(alias.host.sizes(), alias.host.strides(),
                                      alias.host.storage_offset());
    }
  }
};

template <class Convert>
c10::IValue converted(const c10::IValue& value, const Convert& convert) {
  if (value.isTensor()) return convert(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(convert(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      list.push_back(tensor ? std::optional<at::Tensor>(convert(*tensor)) : std::nullopt);
    return list;
  }
  return value;
}

void on_the_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  static const std::set<std::string> copies = {"aten::copy_", "aten::_copy_from",
                                               "aten::_foreach_copy_"};
  const c10::FunctionSchema& schema = op.schema();
  Call call;
  const auto to_host = [&](const at::Tensor& tensor) { return call.to_host(tensor); };
  for (size_t i = 0, count = schema.arguments().size(); i < count; ++i) {
    c10::IValue& value = (*stack)[stack->size() - count + i];
    if (value.isStorage()) {
      value = call.to_host(value.toStorage());
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = c10::Device(c10::DeviceType::CPU);
    } else if (schema.arguments()[i].name() == "pin_memory") {
      value = c10::IValue();
    } else {
      const bool seen_host = call.seen_host;
      value = converted(value, to_host);
      // A GPU takes indices of the host's.
      if (value.isOptionalTensorList()) call.seen_host = seen_host;
    }
  }
  TORCH_CHECK(!(call.seen_device && call.seen_host) || copies.count(schema.name()),
              "Expected all tensors to be on the same device, but found at least two devices, "
              "cuda:0 and cpu! (", schema.operator_name(), ")");
  op.callBoxed(stack);
  call.settle();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = converted((*stack)[i], [&](const at::Tensor& t) { return call.to_device(t); });
}

int64_t plain_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const std::optional<at::Tensor>&, double, bool, std::optional<double>,
                        bool) {
  return 0;  // the formula, made of other operations
}

at::Tensor host_view(const at::Tensor& tensor) {
  Call call;
  return call.to_host(tensor);
}

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  // Those that PyTorch has one function for on all devices, which looks for the device's own part.
  for (const char* name : {"copy_", "set_.source_Storage", "set_.source_Storage_storage_offset",
                           "_local_scalar_dense", "convolution", "convolution_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
  library.impl("_fused_sdp_choice", plain_attention);
}

TORCH_LIBRARY(rehearsal, library) {
  library.def("host(Tensor tensor) -> Tensor");
}
TORCH_LIBRARY_IMPL(rehearsal, CUDA, library) {
  library.impl("host", host_view);
}
