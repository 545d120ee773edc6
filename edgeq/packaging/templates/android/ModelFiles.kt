package edgeq.model

import android.app.ActivityManager
import android.content.Context
import android.os.Build
import java.io.File
import java.io.IOException

/** The device cannot run the model now; the message says why, for a log or for the user. */
class ModelUnavailableException(message: String) : Exception(message)

/** The model's files on the device, and whether there is memory for it. */
internal object ModelFiles {
    /**
     * Checks the processor and the free memory, before anything is loaded.
     *
     * Android ends an app that takes too much memory without a word, so ask first.
     */
    fun requireDevice(context: Context, neededBytes: Long) {
        if (Build.SUPPORTED_64_BIT_ABIS.isEmpty()) {
            throw ModelUnavailableException("the model needs a 64-bit processor")
        }
        val manager = context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager
        val memory = ActivityManager.MemoryInfo()
        manager.getMemoryInfo(memory)
        val free = memory.availMem - memory.threshold
        if (memory.lowMemory || free < neededBytes) {
            throw ModelUnavailableException(
                "the model needs ${neededBytes shr 20} MiB of memory, and ${free shr 20} MiB are free",
            )
        }
    }

    /**
     * The model as files that native code can open: copied out of the app's assets once.
     *
     * A copy is complete or not there: it is written beside its place and renamed. [sizes] tells an
     * old version of the model, or one that was cut, from the right one.
     */
    fun install(context: Context, sizes: Map<String, Long>): File {
        val folder = File(context.noBackupFilesDir, "@NAME@")
        for ((name, size) in sizes) {
            val target = File(folder, name)
            if (target.length() == size) continue
            target.parentFile?.mkdirs()
            val partial = File(target.path + ".partial")
            context.assets.open(name).use { input ->
                partial.outputStream().use { output -> input.copyTo(output, 1 shl 20) }
            }
            if (partial.length() != size || !partial.renameTo(target)) {
                partial.delete()
                throw IOException("the model's file $name could not be copied to $target")
            }
        }
        return folder
    }
}
