package androidx.test.platform.app

import android.content.Context

class Instrumentation {
    val context: Context get() = throw NotImplementedError()
    val targetContext: Context get() = throw NotImplementedError()
}

object InstrumentationRegistry {
    @JvmStatic
    fun getInstrumentation(): Instrumentation = throw NotImplementedError()
}
