// What the codes of the launchers mean.
#include "device.h"

namespace speft {
namespace cuda {

const char* error_text(int code) {
    if (code == kUnsupported) return "no kernel serves these sizes or this dtype";
    if (code == kTooLittleShared)
        return "this GPU's blocks have less shared memory than the kernel takes";
    return device_error_text(code);
}

}  // namespace cuda
}  // namespace speft
