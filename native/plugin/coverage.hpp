// Objects that hold llama.cpp and call it directly, where no function of ours can stand before it: the program must not go on.
//
// An object whose relocations name llama.cpp's functions is covered, because they are bound to ours; one that exports them is
// called from outside, through relocations or through dlsym. What is left was linked with llama.cpp statically.

#pragma once

namespace plugin {

// Looks at the objects that have been loaded since the last time, and ends the process in words where one cannot be covered.
// Cheap where nothing was loaded.
void look_at_objects();

} // namespace plugin
