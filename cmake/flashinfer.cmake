# Finds FlashInfer's headers: FLASHINFER_INCLUDE_DIR if given, else an installed flashinfer-python of
# the pinned version, else that wheel, downloaded with its hash checked and without its dependencies
# (no torch), of which include/ and spdlog/ are unpacked. Sets FLASHINFER_INCLUDE_DIRS, and
# FLASHINFER_BUILT_WITH for the report.
set(FLASHINFER_VERSION "0.7.2.post1")
set(FLASHINFER_INCLUDE_DIR "" CACHE PATH
    "FlashInfer's include folder; default: an installed flashinfer-python, else its pinned wheel")
set(flashinfer_header "flashinfer/comm/trtllm_allreduce_fusion.cuh")
set(FLASHINFER_SHA256 bfdc18b9e1e4d8d0730fe4343dc0e284cd0c160086de80f99888bc4867922d49)

if(FLASHINFER_INCLUDE_DIR)
  set(FLASHINFER_BUILT_WITH "of FLASHINFER_INCLUDE_DIR")  # whatever version that folder holds
else()
  set(FLASHINFER_BUILT_WITH "${FLASHINFER_VERSION}")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.metadata as m; d = m.distribution('flashinfer-python'); \
print(d.locate_file('flashinfer/data/include') if d.version == '${FLASHINFER_VERSION}' else '')"
    OUTPUT_VARIABLE installed_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(EXISTS "${installed_dir}/${flashinfer_header}")
    set(FLASHINFER_INCLUDE_DIR "${installed_dir}")
  endif()
endif()

if(NOT FLASHINFER_INCLUDE_DIR)
  set(flashinfer_dir "${CMAKE_BINARY_DIR}/flashinfer-${FLASHINFER_VERSION}")
  set(FLASHINFER_INCLUDE_DIR "${flashinfer_dir}/flashinfer/data/include")
  if(NOT EXISTS "${FLASHINFER_INCLUDE_DIR}/${flashinfer_header}")
    message(STATUS "Downloading the headers of flashinfer-python ${FLASHINFER_VERSION}")
    file(WRITE "${flashinfer_dir}/requirements.txt"
         "flashinfer-python==${FLASHINFER_VERSION} --hash=sha256:${FLASHINFER_SHA256}\n")
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --no-deps --require-hashes
              --only-binary=:all: --dest "${flashinfer_dir}"
              --requirement "${flashinfer_dir}/requirements.txt"
      COMMAND_ERROR_IS_FATAL ANY)
    file(GLOB wheel "${flashinfer_dir}/*.whl")
    file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${flashinfer_dir}"
         PATTERNS "flashinfer/data/include/*" "flashinfer/data/spdlog/*")
    file(REMOVE "${wheel}")
  endif()
endif()

if(NOT EXISTS "${FLASHINFER_INCLUDE_DIR}/${flashinfer_header}")
  message(FATAL_ERROR "FLASHINFER_INCLUDE_DIR must hold ${flashinfer_header}, got "
                      "${FLASHINFER_INCLUDE_DIR}; leave it unset to download the headers")
endif()
find_path(SPDLOG_INCLUDE_DIR spdlog/spdlog.h REQUIRED
          HINTS "${FLASHINFER_INCLUDE_DIR}/../spdlog/include"              # the wheel
                "${FLASHINFER_INCLUDE_DIR}/../3rdparty/spdlog/include")    # a source checkout
set(FLASHINFER_INCLUDE_DIRS "${FLASHINFER_INCLUDE_DIR}" "${SPDLOG_INCLUDE_DIR}")
message(STATUS "FlashInfer headers: ${FLASHINFER_INCLUDE_DIR}")
