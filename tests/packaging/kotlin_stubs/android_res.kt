package android.content.res

import java.io.Closeable
import java.io.FileInputStream
import java.io.InputStream

class AssetFileDescriptor : Closeable {
    val startOffset: Long get() = throw NotImplementedError()
    val declaredLength: Long get() = throw NotImplementedError()

    fun createInputStream(): FileInputStream = throw NotImplementedError()

    override fun close() = Unit
}

class AssetManager {
    fun open(name: String): InputStream = throw NotImplementedError()

    fun openFd(name: String): AssetFileDescriptor = throw NotImplementedError()
}
