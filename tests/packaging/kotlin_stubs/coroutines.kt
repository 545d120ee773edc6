package kotlinx.coroutines

import kotlin.coroutines.CoroutineContext

interface CoroutineScope

object Dispatchers {
    val IO: CoroutineContext get() = throw NotImplementedError()
    val Default: CoroutineContext get() = throw NotImplementedError()
}

suspend fun <T> withContext(context: CoroutineContext, block: suspend CoroutineScope.() -> T): T =
    throw NotImplementedError()

fun <T> runBlocking(block: suspend CoroutineScope.() -> T): T = throw NotImplementedError()
