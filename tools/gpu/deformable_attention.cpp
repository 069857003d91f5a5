// What mmcv's sources of deformable attention lack to be a module of their own: bindings to Python, and the entry of
// the CUDA functions in mmcv's table of devices. mmcv has both in files that name all operators.
#include <torch/extension.h>

#include "pytorch_device_registry.hpp"

using at::Tensor;

#define INPUTS const Tensor &, const Tensor &, const Tensor &, const Tensor &, const Tensor &
#define GRADIENTS const Tensor &, Tensor &, Tensor &, Tensor &

Tensor ms_deform_attn_forward(INPUTS, const int);
void ms_deform_attn_backward(INPUTS, GRADIENTS, const int);
Tensor ms_deform_attn_impl_forward(INPUTS, const int);
void ms_deform_attn_impl_backward(INPUTS, GRADIENTS, const int);
Tensor ms_deform_attn_cuda_forward(INPUTS, const int);
void ms_deform_attn_cuda_backward(INPUTS, GRADIENTS, const int);

REGISTER_DEVICE_IMPL(ms_deform_attn_impl_forward, CUDA, ms_deform_attn_cuda_forward);
REGISTER_DEVICE_IMPL(ms_deform_attn_impl_backward, CUDA, ms_deform_attn_cuda_backward);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using pybind11::arg;
  module.def("ms_deform_attn_forward", &ms_deform_attn_forward, arg("value"), arg("value_spatial_shapes"),
             arg("value_level_start_index"), arg("sampling_locations"), arg("attention_weights"), arg("im2col_step"));
  module.def("ms_deform_attn_backward", &ms_deform_attn_backward, arg("value"), arg("value_spatial_shapes"),
             arg("value_level_start_index"), arg("sampling_locations"), arg("attention_weights"), arg("grad_output"),
             arg("grad_value"), arg("grad_sampling_loc"), arg("grad_attn_weight"), arg("im2col_step"));
}
