package ai.onnxruntime

import java.nio.FloatBuffer
import java.util.Optional

open class OnnxValue

class OnnxTensor : OnnxValue(), AutoCloseable {
    val floatBuffer: FloatBuffer get() = throw NotImplementedError()

    override fun close() = Unit

    companion object {
        @JvmStatic
        fun createTensor(environment: OrtEnvironment, data: FloatBuffer, shape: LongArray): OnnxTensor =
            throw NotImplementedError()
    }
}

class OrtEnvironment {
    fun createSession(model: ByteArray, options: OrtSession.SessionOptions): OrtSession =
        throw NotImplementedError()

    companion object {
        @JvmStatic
        fun getEnvironment(): OrtEnvironment = throw NotImplementedError()
    }
}

class OrtSession : AutoCloseable {
    class SessionOptions {
        fun setIntraOpNumThreads(threads: Int) = Unit
    }

    class Result : AutoCloseable {
        fun get(name: String): Optional<OnnxValue> = throw NotImplementedError()

        override fun close() = Unit
    }

    fun run(inputs: Map<String, OnnxTensor>): Result = throw NotImplementedError()

    override fun close() = Unit
}
