// A step of a stream as a function of Python's own: TorchScript's way to a method of a class takes as long as the step itself.
#pragma once

#include "stream.h"

// Without Python's headers, which not every Python comes with, there is none.
#if __has_include(<Python.h>)
#include <torch/csrc/autograd/python_variable.h>

namespace {

using Held = c10::intrusive_ptr<Stream>;

PyObject* call_step(PyObject* held, PyObject* x) {
  if (!THPVariable_Check(x)) return PyErr_Format(PyExc_TypeError, "x: expected a tensor, found %s", Py_TYPE(x)->tp_name);
  try {
    const Stream& stream = **static_cast<Held*>(PyCapsule_GetPointer(held, nullptr));
    const at::Tensor& given = THPVariable_Unpack(x);
    at::Tensor output;
    {
      pybind11::gil_scoped_release others_run;
      output = stream.step(given);
    }
    return THPVariable_Wrap(std::move(output));
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
}

// The address of a new reference to the function x -> output, which keeps the stream alive; 0 where there is none.
int64_t function_of(const Held& stream) {
  static PyMethodDef definition = {"step", call_step, METH_O, nullptr};
  pybind11::gil_scoped_acquire python;
  const auto forget = [](PyObject* held) { delete static_cast<Held*>(PyCapsule_GetPointer(held, nullptr)); };
  PyObject* held = PyCapsule_New(new Held(stream), nullptr, forget);
  PyObject* function = PyCFunction_New(&definition, held);
  Py_DECREF(held);
  return reinterpret_cast<int64_t>(function);
}
}  // namespace
#else
namespace {
int64_t function_of(const c10::intrusive_ptr<Stream>&) { return 0; }
}  // namespace
#endif
