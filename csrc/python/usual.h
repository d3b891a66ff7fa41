// The usual call of a loss, from Python's objects to Python's objects without a detour.
#pragma once

#include <pybind11/pybind11.h>

namespace ban_fast {

// Adds the function usual_kd to the module; ban_fast/_native.pyi has its signature. Throws error_already_set.
void add_usual_calls(PyObject* module);

}  // namespace ban_fast
