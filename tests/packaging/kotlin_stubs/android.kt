// Stand-ins for what the packages' Kotlin code uses of Android, with the signatures of the platform.
@file:Suppress("UNUSED_PARAMETER")

package android.content

import java.io.File

open class Context {
    val assets: android.content.res.AssetManager get() = throw NotImplementedError()
    val noBackupFilesDir: File get() = throw NotImplementedError()
    val cacheDir: File get() = throw NotImplementedError()

    fun getSystemService(name: String): Any = throw NotImplementedError()

    companion object {
        const val ACTIVITY_SERVICE = "activity"
    }
}
