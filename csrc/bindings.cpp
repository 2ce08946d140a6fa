// The extension module: every operation of contracts/operations.h takes one tuple, which holds the members of its
// parameters in the order of their lists, and tuples of their own for structs among them. Where a pointer is wanted, a
// tensor is given, or a part of one as (tensor, bytes before it), or None. The lists are exported, and
// sfr_ext/ops/contracts.py is held to them at import. Shapes, types and options have been checked by sfr_ext/checks.py.
// The GIL, where there is one, is released while kernels run; nothing here relies on it: what calls share is constant
// after import, atomic, or behind a lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>

#include "contracts/operations.h"
#include "cpu/dispatch.h"
#include "cuda/cuda.h"
#ifdef SFR_CUDA
#include "cuda/runtime.h"
#endif

namespace py = pybind11;

namespace {

// From Python: a member of a struct from an entry of a tuple.
template <class Member>
void read(PyObject* from, Member& member);

template <class Struct>
struct Reader {
  PyObject* tuple;
  Py_ssize_t next = 0;

  template <class Member>
  void operator()(const char* name, Member& member) {
    if (next >= PyTuple_GET_SIZE(tuple))
      throw py::type_error(std::string("sfr_ext._C: ") + Struct::title() + ": expected " + name + ", got the end");
    read(PyTuple_GET_ITEM(tuple, next++), member);
  }
};

template <class Struct>
void read_fields(PyObject* from, Struct& to) {
  if (!PyTuple_Check(from)) throw py::type_error(std::string("sfr_ext._C: expected a tuple for ") + Struct::title());
  Reader<Struct> reader{from};
  to.fields(reader);
  if (reader.next != PyTuple_GET_SIZE(from))
    throw py::type_error(std::string("sfr_ext._C: ") + Struct::title() + ": expected a tuple of " +
                         std::to_string(reader.next) + ", got " + std::to_string(PyTuple_GET_SIZE(from)));
}

// Tensors are known by their data_ptr() alone: nothing here knows torch. The name is made at import: a thread that
// waits for another to make a static of a function would hold up a collection of garbage, and that the other thread.
PyObject* data_ptr = nullptr;

void* address_of(PyObject* tensor) {
  if (tensor == Py_None) return nullptr;
  if (PyTuple_Check(tensor) && PyTuple_GET_SIZE(tensor) == 2)
    return static_cast<char*>(address_of(PyTuple_GET_ITEM(tensor, 0))) + PyLong_AsSsize_t(PyTuple_GET_ITEM(tensor, 1));
  const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, data_ptr));
  if (!address) throw py::error_already_set();
  return PyLong_AsVoidPtr(address.ptr());
}

template <class Member>
void read(PyObject* from, Member& member) {
  if constexpr (std::is_class_v<Member>) {
    return read_fields(from, member);
  } else if constexpr (std::is_pointer_v<Member>) {
    member = static_cast<Member>(address_of(from));
  } else if constexpr (std::is_floating_point_v<Member>) {
    member = Member(PyFloat_AsDouble(from));
  } else {
    member = Member(PyLong_AsLongLong(from));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
}

// To Python: what a struct holds, ((name, kind, default), ...).
template <class Member>
const char* kind_of(const Member& member) {
  if constexpr (std::is_class_v<Member>)
    return Member::title();
  else if constexpr (std::is_pointer_v<Member>)
    return "Tensor";
  else if constexpr (std::is_enum_v<Member>)
    return name_of(member);
  else if constexpr (std::is_floating_point_v<Member>)
    return "float";
  else
    return std::is_same_v<Member, bool> ? "bool" : "int";
}

template <class Member>
py::object value_of(Member& member) {
  if constexpr (std::is_class_v<Member>) {
    py::list values;
    member.fields([&](const char*, auto& part) { values.append(value_of(part)); });
    return py::tuple(values);
  } else if constexpr (std::is_pointer_v<Member>) {
    return py::none();
  } else if constexpr (std::is_enum_v<Member>) {
    return py::int_(int(member));
  } else {
    return py::cast(member);
  }
}

template <class Choice>
void describe_choices(py::dict choices, Choice choice) {
  py::list names;
  choices_of(choice, [&](const char* name) { names.append(name); });
  choices[name_of(choice)] = py::tuple(names);
}

// `Struct` and every struct and list of choices that it is made of.
template <class Struct>
void describe(py::dict fields, py::dict choices) {
  if (fields.contains(Struct::title())) return;
  Struct initial;
  py::list members;
  initial.fields([&](const char* name, auto& member) {
    using Member = std::decay_t<decltype(member)>;
    members.append(py::make_tuple(name, kind_of(member), value_of(member)));
    if constexpr (std::is_class_v<Member>) describe<Member>(fields, choices);
    if constexpr (std::is_enum_v<Member>) describe_choices(choices, member);
  });
  fields[Struct::title()] = py::tuple(members);
}

// name(params) on the CPU: to a status.
template <class Params>
void on_cpu(py::module_& m, const char* name, sfr::Status (*run)(const Params&)) {
  m.def(name, [run](const py::tuple& given) {
    Params params;
    read_fields(given.ptr(), params);
    const py::gil_scoped_release release;
    return int(run(params));
  });
}

#ifdef SFR_CUDA
template <class Params>
using OnGpu = int64_t (*)(const Params&, const sfr::cuda::Where&);

// name(params, where) on a GPU: launches, or returns the bytes of scratch that are missing.
template <class Params>
void on_gpu(py::module_& m, const char* name, OnGpu<Params> in_float, OnGpu<Params> in_double) {
  m.def(name, [in_float, in_double](const py::tuple& given, const py::tuple& place) {
    Params params;
    sfr::cuda::Where where;
    read_fields(given.ptr(), params);
    read_fields(place.ptr(), where);
    const py::gil_scoped_release release;
    return (params.compute == sfr::DType::float64 ? in_double : in_float)(params, where);
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Kernels of sfr_ext; the contracts are csrc/contracts/*.h.";
  data_ptr = PyUnicode_InternFromString("data_ptr");
  if (!data_ptr) throw py::error_already_set();
  py::dict fields, choices;
#define SFR_DESCRIBE(name, Params) describe<sfr::Params>(fields, choices);
  SFR_OPERATIONS(SFR_DESCRIBE)
  SFR_CPU_OPERATIONS(SFR_DESCRIBE)
  describe<sfr::cuda::Where>(fields, choices);
  m.attr("fields") = fields;
  m.attr("choices") = choices;
#define SFR_ON_CPU(name, Params) on_cpu<sfr::Params>(m, #name, sfr::cpu::name);
  SFR_OPERATIONS(SFR_ON_CPU)
  SFR_CPU_OPERATIONS(SFR_ON_CPU)
  m.def("cpu_isa", sfr::cpu::isa);
  m.def("cpu_isas", sfr::cpu::usable_isas);
#ifdef SFR_CUDA
  py::module_ gpu = m.def_submodule("cuda", "The same on a GPU.");
#define SFR_ON_GPU(name, Params) on_gpu<sfr::Params>(gpu, #name, sfr::cuda::name<float>, sfr::cuda::name<double>);
  SFR_OPERATIONS(SFR_ON_GPU)
  gpu.def("why_unusable", sfr::cuda::why_unusable);
  gpu.def("why_unusable_on", sfr::cuda::why_unusable_on);
#endif
}
