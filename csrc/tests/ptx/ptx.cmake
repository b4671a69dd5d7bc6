# The PTX of cuda_check and of the kernels, as nvcc made it for the object files, translated to C++
# and run on an x86 CPU with FMA and F16C. The translation knows the PTX of one release of nvcc.
set(ptx_release 13.0)
set(ptx_architectures 75 80)
set(ptx_files 8)

if(NOT CMAKE_SYSTEM_PROCESSOR STREQUAL x86_64 OR
    NOT CMAKE_CUDA_COMPILER_VERSION MATCHES "^${ptx_release}[.]")
  message(STATUS "PTX is not run on the CPU: that needs x86 and nvcc ${ptx_release}")
  return()
endif()
find_package(Python3 3.11 REQUIRED COMPONENTS Interpreter)
set(ptx_kept ${CMAKE_CURRENT_BINARY_DIR}/ptx/kept)
set(ptx_out ${CMAKE_CURRENT_BINARY_DIR}/ptx/translated)
file(MAKE_DIRECTORY ${ptx_kept})

foreach(architecture IN LISTS ptx_architectures)
  if(NOT "${CMAKE_CUDA_ARCHITECTURES}" MATCHES "(^|;)${architecture}(-|;|$)")
    message(STATUS "PTX is not run on the CPU: compute_${architecture} is not built")
    return()
  endif()
  foreach(name update_perturb cuda_check)
    list(APPEND ptx_sources ${architecture}=${ptx_kept}/${name}.compute_${architecture}.ptx)
  endforeach()
endforeach()
foreach(target zo2ext_cuda cuda_check)
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:--keep;--keep-dir;${ptx_kept}>")
endforeach()

math(EXPR last "${ptx_files} - 1")
set(translated ${ptx_out}/mutants.cpp)
foreach(i RANGE ${last})
  list(APPEND translated ${ptx_out}/ptx_${i}.cpp)
endforeach()
set(ptx_folder ${CMAKE_CURRENT_SOURCE_DIR}/csrc/tests/ptx)
add_custom_command(OUTPUT ${translated}
  COMMAND ${Python3_EXECUTABLE} ${ptx_folder}/translate.py ${ptx_out} ${ptx_files} ${ptx_sources}
  DEPENDS ${ptx_folder}/translate.py ${ptx_folder}/mutants.py
    zo2ext_cuda $<TARGET_OBJECTS:zo2ext_cuda> $<TARGET_OBJECTS:cuda_check>
  VERBATIM)

# nvcc's own object files, with another CUDA runtime: launches come to the machine.
add_executable(ptx_check ${translated} ${ptx_folder}/machine.cpp ${ptx_folder}/runtime.cpp
  $<TARGET_OBJECTS:zo2ext_cuda> $<TARGET_OBJECTS:cuda_check>)
target_include_directories(ptx_check PRIVATE ${ptx_folder} ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_options(ptx_check PRIVATE
  -O1 -fno-tree-pre -fno-ipa-cp -fira-region=one -ffp-contract=off
  -fno-math-errno -mfma -mf16c -fno-strict-aliasing)
target_link_libraries(ptx_check PRIVATE zo2ext_cpu)
set_target_properties(ptx_check PROPERTIES LINKER_LANGUAGE CXX CUDA_RUNTIME_LIBRARY None)

# The settings are those that runtime.cpp lists.
function(add_ptx_check name)
  add_test(NAME ${name} COMMAND ptx_check small)
  set_tests_properties(${name} PROPERTIES ENVIRONMENT "${ARGN}")
endfunction()
add_ptx_check(ptx_80 PTX_ARCHITECTURE=80)
foreach(architecture IN LISTS ptx_architectures)
  add_ptx_check(ptx_${architecture}_random PTX_ARCHITECTURE=${architecture} PTX_RANDOM=1)
endforeach()
# Every deliberate fault has to show.
file(STRINGS ${ptx_folder}/mutants.py mutants REGEX "^    Mutant\\(")
set(mutant 0)
foreach(line IN LISTS mutants)
  math(EXPR mutant "${mutant} + 1")
  add_ptx_check(ptx_mutant_${mutant} PTX_MUTANT=${mutant})
  set_tests_properties(ptx_mutant_${mutant} PROPERTIES
    PASS_REGULAR_EXPRESSION " differs:|ptx: (an access outside|a race)")
endforeach()
